"""The fast lane keeps the promises of the ordinary way; measurements/benchmark.py has its speed."""

import asyncio
import socket
import ssl
from typing import Any

from tornado.httpclient import HTTPRequest
from tornado.iostream import IOStream
from tornado.testing import AsyncHTTPSTestCase
from tornado.websocket import WebSocketClientConnection, websocket_connect

from client import parse
from server import WebSocketServer
from tests import faults
from tests.recipes.fast_lane import frame, make_fast_app
from tests.support import HANDSHAKE, PATIENCE, QuietCase, new_handler, serving


class FastLaneTests(QuietCase):
    async def asyncSetUp(self) -> None:
        await self.serve()

    async def serve(self, context: ssl.SSLContext | None = None) -> None:
        self.handler = new_handler()
        app = make_fast_app(self.handler)
        self.url = await self.enterAsyncContext(serving(app, ssl=context))

    async def join(self) -> WebSocketClientConnection:
        reader = await websocket_connect(HTTPRequest(self.url, validate_cert=False))
        self.addCleanup(reader.close)
        self.assertEqual((await self.read(reader))[0], 0)
        return reader

    async def read(self, reader: WebSocketClientConnection) -> tuple[int, list[Any]]:
        return parse(str(await asyncio.wait_for(reader.read_message(), PATIENCE)))[1:]

    async def join_without_pongs(self) -> IOStream:
        """Connect a client that answers nothing, and read its first message."""
        peer = await self.enterAsyncContext(faults.raw_client(self.url, HANDSHAKE))
        await peer.read_until(b"}")
        return peer

    def narrow_connection(self) -> Any:
        """Let the only client's socket take little at once, and return its connection."""
        (client,) = (client for client in WebSocketServer.clients if type(client) is self.handler)
        connection: Any = client.ws_connection
        connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return connection

    async def test_slow_reader_gets_everything_in_few_messages(self) -> None:
        """What a socket takes only in part arrives whole and in order, also over TLS."""
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(**AsyncHTTPSTestCase.default_ssl_options())
        sent = ["x" * 1_000_000, *(f"{number:20000}" for number in range(200))]
        for context in (None, tls):
            await self.serve(context)
            reader = await self.join()
            self.narrow_connection()
            for sample in sent:
                self.handler.send_message([sample])
                await asyncio.sleep(0)
            got: list[str] = []
            messages = 0
            while len(got) < len(sent):
                offset, samples = await self.read(reader)
                self.assertEqual(offset, len(got))
                got += samples
                messages += 1
            self.assertTrue(got == sent)  # assertEqual would print all of it
            self.assertLess(messages, 150)

    async def test_late_joiner_catches_up_while_the_stream_goes_on(self) -> None:
        """A client that is behind gets everything, once and in order."""
        self.handler.stream.message_size = 1
        self.handler.send_message(list(range(100)))
        late = await self.join()
        for number in range(1, 200):
            self.handler.send_message([99 + number])
            self.assertEqual(await self.read(late), (number, [number]))

    async def test_one_turn_of_the_event_loop_is_one_message(self) -> None:
        """What is sent in one turn comes together, as far as history and message size allow."""
        reader = await self.join()
        self.handler.send_message([])  # is nothing to send
        await asyncio.sleep(0)
        self.handler.stream.history_size, self.handler.stream.message_size = 4, 3
        for samples in [0, 1], [2], [3, 4, 5, 6]:
            self.handler.send_message(samples)
        self.assertEqual(await self.read(reader), (3, [3, 4, 5]))
        self.assertEqual(await self.read(reader), (6, [6]))

    async def test_two_streams_stay_apart(self) -> None:
        """A client gets nothing of another stream in the same process."""
        reader, first = await self.join(), self.handler
        await self.serve()
        self.handler.send_message([1])
        first.send_message([2])
        self.assertEqual(await self.read(reader), (0, [2]))

    async def test_frame_goes_behind_a_ping_that_is_sent_in_part(self) -> None:
        """A frame waits for what Tornado has yet to write, though the socket has room again."""
        peer = await self.join_without_pongs()
        connection = self.narrow_connection()
        expected = b""
        while not connection.stream.writing():
            connection.write_ping(b"")
            expected += b"\x89\0"
        self.handler.send_message([1])
        await asyncio.sleep(0)  # the stream has grown, and sends in the next turn
        expected += frame(self.handler.stream.read(0)[0].encode())
        # This call takes what the socket holds at once, and so makes room before that turn.
        got = peer.read_bytes(len(expected))
        self.assertEqual(await asyncio.wait_for(got, PATIENCE), expected)

    async def test_closing_and_reset_connections_are_passed_over(self) -> None:
        """Nothing follows a Close frame, and a reset client costs the others nothing."""
        closing = await self.join_without_pongs()
        self.narrow_connection().close(1001)
        vanishing, other = await self.join_without_pongs(), await self.join()
        faults.reset(vanishing)
        self.handler.send_message([1])
        self.assertEqual(await self.read(other), (0, [1]))
        await closing.write(faults.frame(faults.CLOSE))  # now the server ends the connection
        self.assertEqual(await closing.read_until_close(), b"\x88\x02\x03\xe9")

    def test_length_stands_in_a_frame_in_its_shortest_form(self) -> None:
        """The length of the text takes one, three or nine bytes."""
        self.assertEqual(frame(b"x" * 126)[:-126], b"\x81\x7e\0\x7e")
        self.assertEqual(frame(b"x" * 65_536)[:-65_536], b"\x81\x7f\0\0\0\0\0\1\0\0")
