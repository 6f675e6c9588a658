"""The fast lane keeps what the protocol promises of the ordinary way, and gathers.

How fast it is, benchmark.py measures.
"""

import asyncio
import contextlib
import importlib.util
import io
import json
import socket
import ssl
import unittest
from typing import Any
from unittest import mock

from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port, gen_test
from tornado.websocket import WebSocketClientConnection, websocket_connect

from server import WebSocketServer, make_app, serve
from tests.recipes.fast_lane import FastLane, frame
from tests.support import HANDSHAKE, PairCase, fresh_server, until


class FastLaneTests(PairCase):
    unread = True

    def listen(self, port: int = 0) -> None:
        self.server = fresh_server(FastLane)
        super().listen(port)

    async def connect(self, url: str = "", **options: Any) -> WebSocketClientConnection:
        client = await websocket_connect(HTTPRequest(url or self.url, **options))
        self.assertEqual(await self.take(client), (0, []))
        return client

    async def take(self, client: WebSocketClientConnection) -> tuple[int, list[Any]]:
        message = json.loads(await client.read_message() or "null")
        return message["offset"], message["samples"]

    async def storm(self, url: str, **options: Any) -> None:
        """Send more than the buffers hold; it is all to come, in order, in fewer messages."""
        client = await self.connect(url, **options)
        peer: Any = next(iter(self.server.clients)).ws_connection
        peer.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for number in range(100):
            peer.write_ping(bytes(100))  # may have to wait, too
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
        client = await self.connect()
        self.server.send_message([])  # is nothing to send
        await asyncio.sleep(0)
        parts = (
            (2_100, 0, 3, [0]),
            (2_100, 3, 1_503, [3, 1_003]),
            (2_100, 1_503, 3_703, [1_603, 2_603, 3_603]),
            (100, 3_703, 3_853, [3_753]),  # a history that is shorter than a message
        )
        for self.server.history_size, begin, end, offsets in parts:
            for number in range(begin, end):
                self.server.send_message([number])
            for offset in offsets:
                expected = offset, [*range(offset, min(offset + 1_000, end))]
                self.assertEqual(await self.take(client), expected)
        self.server.send_message(["x" * 70_000])  # has the longest form of a frame
        self.assertEqual(await self.take(client), (3_853, ["x" * 70_000]))

    @gen_test
    async def test_goes_behind_a_ping_that_is_sent_in_part(self) -> None:
        """A frame waits for what the stream has not written, even if the socket has room again."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(HANDSHAKE)
            await until(lambda: self.server.clients)
            handler = next(iter(self.server.clients))
            await until(lambda: not handler.writing)
            client.recv(4096)  # the answer, and where the stream stands
            peer: Any = handler.ws_connection
            peer.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            expected = b""
            while not peer.stream.writing():
                peer.write_ping(bytes(100))
                expected += bytes([0x89, 100, *bytes(100)])
            got = client.recv(1 << 24)
            self.server.send_message([1])
            expected += frame(self.server.message(0, 1))
            client.setblocking(False)
            while len(got) < len(expected):
                got += await asyncio.get_running_loop().sock_recv(client, 1 << 24)
        self.assertEqual(got, expected)

    @gen_test
    async def test_closing_and_dead_clients_are_passed_over(self) -> None:
        """Nothing follows a Close frame, and a reset client costs the others nothing."""
        dead, other = socket.create_connection(("127.0.0.1", self.port)), await self.connect()
        dead.sendall(HANDSHAKE)
        dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await until(lambda: len(self.server.clients) == 2)
        before = set(self.server.clients)
        await self.connect()
        (closing,) = self.server.clients - before
        dead.close()
        peer: Any = closing.ws_connection
        peer.close(1001)
        with mock.patch.object(peer, "stream") as stream:
            stream.closed.return_value = stream.writing.return_value = False
            self.server.send_message([1])
            self.assertEqual(await self.take(other), (0, [1]))
        stream.write.assert_not_called()
        stream.socket.send.assert_not_called()

    @gen_test
    async def test_what_waits_is_sent_before_the_goodbye(self) -> None:
        """Samples of the turn in which `serve` is cancelled come before its Close frame."""
        self.server.clients = WebSocketServer.clients  # those to whom `serve` says goodbye
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            serving = asyncio.ensure_future(serve(make_app(self.server), 0, "127.0.0.1"))
            await until(printed.getvalue)
        client = await self.connect(printed.getvalue().strip())
        serving.cancel()
        self.server.send_message([1])
        self.assertEqual(await self.take(client), (0, [1]))
        self.assertIsNone(await client.read_message())
        await asyncio.wait([serving])
