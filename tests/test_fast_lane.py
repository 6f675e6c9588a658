"""The fast lane keeps what the protocol promises of the ordinary way, and gathers.

How fast it is, benchmark.py measures.
"""

import asyncio
import importlib.util
import socket
import ssl
import unittest
from typing import Any, ClassVar
from unittest import mock

from tornado.testing import gen_test

from server import make_app
from tests.recipes.fast_lane import FastLane, frame
from tests.support import HANDSHAKE, until
from tests.test_server import ServerCase


class FastLaneTests(ServerCase):
    attributes: ClassVar[dict[str, Any]] = {"handler": FastLane}

    async def storm(self, **options: Any) -> None:
        """Send more than the buffers hold; it is all to come, in order, in fewer messages."""
        (client,) = await self.ready(**options)
        peer: Any = next(iter(self.server.clients)).ws_connection
        peer.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for number in range(100):
            peer.write_ping(bytes(100))  # may have to wait, too
            self.server.send_message([f"{number:20000}"])
            await asyncio.sleep(0)
        got, messages = list[str](), 0
        while len(got) < 100:
            offset, samples = await self.read(client)
            self.assertEqual(offset, len(got))
            got, messages = got + samples, messages + 1
        self.assertEqual([*map(int, got)], [*range(100)])
        self.assertLess(messages, 50)

    @gen_test
    async def test_slow_reader_gets_everything_in_few_messages(self) -> None:
        """Frames that are sent in part arrive whole and in order."""
        await self.storm()

    @unittest.skipUnless(importlib.util.find_spec("trustme"), "trustme is not installed")
    @gen_test
    async def test_works_over_tls(self) -> None:
        """Over TLS, too, frames that are sent in part arrive whole and in order."""
        import trustme

        authority, trusting = trustme.CA(), ssl.create_default_context()
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        authority.configure_trust(trusting)
        address = self.serve(make_app(self.server), ssl_options=context)
        await self.storm(url=f"wss://{address}/websocket", ssl_options=trusting)

    @gen_test
    async def test_gathers_one_turn_of_the_event_loop(self) -> None:
        """What comes in one turn is one message, or as many as message_size and history ask for."""
        (client,) = await self.ready()
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
                self.assertEqual(await self.read(client), expected)
        self.server.send_message(["x" * 70_000])  # has the longest form of a frame
        self.assertEqual(await self.read(client), (3_853, ["x" * 70_000]))

    @gen_test
    async def test_goes_behind_a_ping_that_is_sent_in_part(self) -> None:
        """A frame waits for what the stream has not written, even if the socket has room again."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            client.sendall(HANDSHAKE)
            await until(lambda: self.server.clients)
            await self.written()
            client.recv(4096)  # the answer, and where the stream stands
            peer: Any = next(iter(self.server.clients)).ws_connection
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
        dead, (other,) = socket.create_connection(("127.0.0.1", self.port)), await self.ready()
        dead.sendall(HANDSHAKE)
        dead.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await until(lambda: len(self.server.clients) == 2)
        before = set(self.server.clients)
        await self.ready()
        (closing,) = self.server.clients - before
        dead.close()
        peer: Any = closing.ws_connection
        peer.close(1001)
        with mock.patch.object(peer, "stream") as stream:
            stream.closed.return_value = stream.writing.return_value = False
            self.server.send_message([1])
            self.assertEqual(await self.read(other), (0, [1]))
        stream.write.assert_not_called()
        stream.socket.send.assert_not_called()

    @gen_test
    async def test_what_waits_is_sent_before_the_goodbye(self) -> None:
        """Samples of the turn in which `serve` is cancelled come before its Close frame."""
        serving = await self.begin()
        (client,) = await self.ready()
        serving.cancel()
        self.server.send_message([1])
        self.assertEqual(await self.read(client), (0, [1]))
        self.assertIsNone(await client.read_message())
