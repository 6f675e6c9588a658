"""The fast lane keeps the promises of the ordinary way; measurements/benchmark.py has its speed."""

import asyncio
import socket
from typing import Any

from tornado.websocket import WebSocketClientConnection

from tests import faults, test_server
from tests.recipes.fast_lane import frame, make_fast_app
from tests.support import PATIENCE, serving
from tests.test_server import read, tls_context


class ConnectingTests(test_server.ConnectingTests):
    make_app = staticmethod(make_fast_app)


class MakeAppTests(test_server.MakeAppTests):
    make_app = staticmethod(make_fast_app)


class SendingTests(test_server.SendingTests):
    make_app = staticmethod(make_fast_app)

    def narrow_connection(self) -> Any:
        """Let the only client's socket take little at once, and return its connection."""
        (client,) = self.handler.clients
        connection: Any = client.ws_connection
        connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection

    async def test_slow_reader(self) -> None:
        """What a socket takes only in part arrives whole, in order, and in few messages."""
        await self.check_slow_reader(await self.ready())

    async def test_slow_reader_over_tls(self) -> None:
        """The same is true with TLS."""
        async with serving(make_fast_app(self.handler), ssl=tls_context()) as self.url:
            reader = await self.connect(validate_cert=False)
            self.assertEqual(await read(reader), (0, []))
            await self.check_slow_reader(reader)

    async def check_slow_reader(self, reader: WebSocketClientConnection) -> None:
        self.narrow_connection()
        sent = ["x" * 1_000_000, *(f"{number:20000}" for number in range(200))]
        for sample in sent:
            self.handler.send_message([sample])
            await asyncio.sleep(0)
        got: list[str] = []
        messages = 0
        while len(got) < len(sent):
            offset, samples = await read(reader)
            self.assertEqual(offset, len(got))
            got += samples
            messages += 1
        self.assertTrue(got == sent)  # assertEqual would print all of it
        self.assertLess(messages, 150)

    async def test_one_turn_of_the_event_loop_is_one_message(self) -> None:
        """What is sent in one turn comes together, as far as history and message size allow."""
        reader = await self.ready()
        self.handler.send_message([])  # is nothing to send
        await asyncio.sleep(0)
        self.stream.history_size, self.stream.message_size = 4, 3
        for samples in [0, 1], [2], [3, 4, 5, 6]:
            self.handler.send_message(samples)
        self.assertEqual(await read(reader), (3, [3, 4, 5]))
        self.assertEqual(await read(reader), (6, [6]))

    async def test_late_joiner_while_the_stream_goes_on(self) -> None:
        """A client that is behind gets everything, once and in order."""
        self.stream.message_size = 1
        self.handler.send_message([*range(100)])
        late = await self.connect()
        for number in range(200):
            self.assertEqual(await read(late), (number, [number]))
            self.handler.send_message([100 + number])

    async def test_frame_goes_behind_a_ping_that_is_sent_in_part(self) -> None:
        """A frame waits for what Tornado has yet to write, though the socket has room again."""
        peer = await self.peer()
        await faults.read_frame(peer)
        connection = self.narrow_connection()
        expected = b""
        while not connection.stream.writing():
            connection.write_ping(b"")
            expected += b"\x89\0"
        self.handler.send_message([1])
        await asyncio.sleep(0)  # the stream has grown, and sends in the next turn
        expected += frame(self.stream.read(0)[0].encode())
        # This call takes what the socket holds at once, and so makes room before that turn.
        got = peer.read_bytes(len(expected))
        self.assertEqual(await asyncio.wait_for(got, PATIENCE), expected)

    async def test_closing_and_reset_connections_are_passed_over(self) -> None:
        """Nothing follows a Close frame, and a reset client costs the others nothing."""
        closing = await self.peer()
        await faults.read_frame(closing)
        self.narrow_connection().close(1001)
        vanishing, other = await self.peer(), await self.ready()
        faults.reset(vanishing)
        self.handler.send_message([1])
        self.assertEqual(await read(other), (0, [1]))
        await closing.write(faults.frame(faults.CLOSE))  # now the server ends the connection
        self.assertEqual(await closing.read_until_close(), b"\x88\x02\x03\xe9")

    def test_length_stands_in_a_frame_in_its_shortest_form(self) -> None:
        """The length of the text takes one, three or nine bytes."""
        self.assertEqual(frame(b"x" * 126)[:-126], b"\x81\x7e\0\x7e")
        self.assertEqual(frame(b"x" * 65_536)[:-65_536], b"\x81\x7f\0\0\0\0\0\1\0\0")
