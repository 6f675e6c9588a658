"""The fast lane keeps what the protocol promises of the ordinary way, and gathers."""

import asyncio
import json
import socket
import ssl
import unittest
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.testing import bind_unused_port, gen_test

from server import make_app
from tests.recipes.fast_lane import FastLane
from tests.support import HANDSHAKE, PairCase, Recorder, fresh_server, until

try:
    import trustme
except ImportError:
    trustme = None  # type: ignore[assignment]


class FastLaneTests(PairCase):
    def listen(self, port: int = 0) -> None:
        self.server = fresh_server(FastLane)
        self.serve_with(None)

    def serve_with(self, ssl_options: Any) -> None:
        listener, self.port = bind_unused_port()
        self.http_server = HTTPServer(make_app(self.server), ssl_options=ssl_options)
        self.http_server.add_socket(listener)
        self.url = f"ws://127.0.0.1:{self.port}/websocket"

    async def slow_reader(self, ssl_options: Any = None) -> IOStream:
        before = set(self.server.clients)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream = IOStream(raw)
        await stream.connect(("127.0.0.1", self.port))
        if ssl_options:
            stream = await stream.start_tls(False, ssl_options, "localhost")
        self.addCleanup(stream.close)
        await stream.write(HANDSHAKE)
        await stream.read_until(b"\r\n\r\n")
        (handler,) = set(self.server.clients) - before
        peer: Any = handler.ws_connection
        peer.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.assertEqual((await self.frame(stream))["samples"], [])
        return stream

    async def frame(self, stream: IOStream) -> dict[str, Any]:
        first, size = await stream.read_bytes(2)
        self.assertEqual(first, 0x81)
        for mark, count, least in (126, 2, 126), (127, 8, 65_536):
            if size == mark:
                size = int.from_bytes(await stream.read_bytes(count))
                self.assertGreaterEqual(size, least)
                break
        return dict(json.loads(await stream.read_bytes(size)))

    async def storm(self, stream: IOStream) -> None:
        for number in range(100):
            self.server.send_message([f"{number:04}" + "x" * 20_000])
            await asyncio.sleep(0)
        samples: list[str] = []
        messages = 0
        while len(samples) < 100:
            message = await self.frame(stream)
            self.assertEqual(message["offset"], len(samples))
            samples += message["samples"]
            messages += 1
        self.assertEqual([int(sample[:4]) for sample in samples], list(range(100)))
        self.assertLess(messages, 50)

    @gen_test
    async def test_slow_reader_gets_everything_in_few_messages(self) -> None:
        """Frames that are sent in part arrive whole and in order, beside a client that reads."""
        recorder = Recorder(self.url)
        self.follow(recorder)
        await self.storm(await self.slow_reader())
        await until(lambda: recorder.position == 100)
        self.assertEqual([int(s[:4]) for s in recorder.samples], list(range(100)))

    @gen_test
    async def test_gathers_one_turn_of_the_event_loop(self) -> None:
        """What comes in one turn is one message, and more than message_size are several."""
        stream = await self.slow_reader()
        for number in range(2_500):
            self.server.send_message([number])
        for offset, end in (0, 1_000), (1_000, 2_000), (2_000, 2_500):
            self.assertEqual((await self.frame(stream))["samples"], list(range(offset, end)))

    @gen_test
    async def test_closing_and_dead_clients_are_passed_over(self) -> None:
        """Nothing follows a Close frame, and a reset client costs the others nothing."""
        closing = await self.slow_reader()
        next(iter(self.server.clients)).close(1001, "going away")
        dead, other = await self.slow_reader(), await self.slow_reader()
        dead.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        dead.close()
        self.server.send_message([1])
        self.assertEqual((await self.frame(other))["samples"], [1])
        self.assertEqual((await closing.read_bytes(2))[0], 0x88)
        closing.close()
        await until(lambda: len(self.server.clients) == 1)

    @unittest.skipUnless(trustme, "trustme is not installed, and makes the certificate")
    @gen_test
    async def test_works_over_tls(self) -> None:
        """Over TLS, a slow reader gets everything in order, too."""
        authority = trustme.CA()
        context, trusting = (
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH),
            ssl.create_default_context(),
        )
        authority.issue_cert("localhost").configure_cert(context)
        authority.configure_trust(trusting)
        self.serve_with(context)
        await self.storm(await self.slow_reader(trusting))
