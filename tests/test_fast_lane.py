"""The fast lane keeps what the protocol promises of the ordinary way, and gathers."""

import asyncio
import contextlib
import importlib.util
import io
import json
import socket
import ssl
import unittest
from typing import Any

from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.testing import bind_unused_port, gen_test
from tornado.websocket import WebSocketClientConnection, websocket_connect

from server import WebSocketServer, make_app, serve
from tests.recipes.fast_lane import FastLane
from tests.support import HANDSHAKE, PairCase, fresh_server, until


class FastLaneTests(PairCase):
    def listen(self, port: int = 0) -> None:
        self.server = fresh_server(FastLane)
        super().listen(port)

    async def take(self, client: WebSocketClientConnection) -> tuple[int, list[Any]]:
        message = json.loads(await client.read_message() or "null")
        return message["offset"], message["samples"]

    async def storm(self, url: str, **options: Any) -> None:
        """Send more than the buffers hold; it is all to come, in order, in fewer messages."""
        client = await websocket_connect(HTTPRequest(url, **options))
        await until(lambda: self.server.clients)
        peer: Any = next(iter(self.server.clients)).ws_connection
        peer.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.assertEqual(await self.take(client), (0, []))
        for number in range(100):
            self.server.send_message([f"{number:20000}"])
            await asyncio.sleep(0)
        got, messages = list[str](), 0
        while len(got) < 100:
            offset, samples = await self.take(client)
            self.assertEqual(offset, len(got))
            got, messages = got + samples, messages + 1
        self.assertEqual([*map(int, got)], [*range(100)])
        self.assertLess(messages, 50)

    @gen_test
    async def test_slow_reader_gets_everything_in_few_messages(self) -> None:
        """Frames that are sent in part arrive whole and in order."""
        await self.storm(self.url)

    @unittest.skipUnless(importlib.util.find_spec("trustme"), "trustme is not installed")
    @gen_test
    async def test_works_over_tls(self) -> None:
        """Over TLS, too, frames that are sent in part arrive whole and in order."""
        import trustme

        authority, trusting = trustme.CA(), ssl.create_default_context()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("localhost").configure_cert(context)
        authority.configure_trust(trusting)
        listener, port = bind_unused_port()
        self.others.append(HTTPServer(make_app(self.server), ssl_options=context))
        self.others[0].add_socket(listener)
        await self.storm(f"wss://localhost:{port}/websocket", ssl_options=trusting)

    @gen_test
    async def test_gathers_one_turn_of_the_event_loop(self) -> None:
        """What comes in one turn is one message, or as many as message_size and history ask for."""
        client, self.server.history_size = await websocket_connect(self.url), 2_100
        self.assertEqual(await self.take(client), (0, []))
        self.server.send_message([])  # is nothing to send
        for begin, end in (0, 3), (3, 4):
            for number in range(begin, end):
                self.server.send_message([number])
            self.assertEqual(await self.take(client), (begin, [*range(begin, end)]))
        self.server.send_message(["x" * 70_000])  # has the longest form of a frame
        self.assertEqual(await self.take(client), (4, ["x" * 70_000]))
        for number in range(5, 2_505):
            self.server.send_message([number])
        for begin, end in (405, 1_405), (1_405, 2_405), (2_405, 2_505):
            self.assertEqual(await self.take(client), (begin, [*range(begin, end)]))

    @gen_test
    async def test_closing_and_dead_clients_are_passed_over(self) -> None:
        """Nothing follows a Close frame, and a reset client costs the others nothing."""
        closing, dead = IOStream(socket.socket()), IOStream(socket.socket())
        for stream in closing, dead:
            await stream.connect(("127.0.0.1", self.port))
            await stream.write(HANDSHAKE)
            await stream.read_until(b"[]}")

        peers: list[Any] = [handler.ws_connection for handler in self.server.clients]
        address = closing.socket.getsockname()
        next(p for p in peers if p.stream.socket.getpeername() == address).close(1001, "away")
        dead.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        dead.close()
        other = await websocket_connect(self.url)
        self.assertEqual(await self.take(other), (0, []))
        self.server.send_message([1])
        self.assertEqual(await self.take(other), (0, [1]))
        await closing.read_until(b"away")
        await closing.write(b"\x88\x82\0\0\0\0\x03\xe9")  # its answer to the Close frame
        self.assertEqual(await closing.read_until_close(), b"")

    @gen_test
    async def test_what_waits_is_sent_before_the_goodbye(self) -> None:
        """Samples of the turn in which `serve` is cancelled come before its Close frame."""
        self.server.clients = WebSocketServer.clients  # those to whom `serve` says goodbye
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            serving = asyncio.ensure_future(serve(make_app(self.server), 0, "127.0.0.1"))
            await until(printed.getvalue)
        client = await websocket_connect(printed.getvalue().strip())
        self.assertEqual(await self.take(client), (0, []))
        serving.cancel()
        self.server.send_message([1])
        self.assertEqual(await self.take(client), (0, [1]))
        self.assertIsNone(await client.read_message())
        await asyncio.wait([serving])
