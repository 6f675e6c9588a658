"""The fast lane, a recipe of the README, keeps what PROTOCOL promises of the ordinary way."""

import asyncio
import json
import socket
from typing import Any, ClassVar

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.testing import bind_unused_port, gen_test
from tornado.websocket import WebSocketClientConnection, websocket_connect

from client import WebSocketClient
from server import WebSocketServer, make_app
from tests import test_faults
from tests.support import HANDSHAKE, PairCase, fresh_server, readme_blocks, until

(BLOCK,) = readme_blocks("The fast lane", "python")
NAMES: dict[str, Any] = {}
exec(BLOCK, NAMES)  # noqa: S102 - our own README


class FastLaneStormTests(test_faults.StormTests):
    """The storm of the fault suite, as it stands, on the fast lane."""

    handler: ClassVar[type[WebSocketServer]] = NAMES["FastLane"]


class FastLaneTests(PairCase):
    def setUp(self) -> None:
        self.assertLessEqual(len(list(filter(None, BLOCK.splitlines()))), 20)
        self.recipe: type[WebSocketServer] = NAMES["FastLane"]
        self.open: list[IOStream | WebSocketClientConnection] = []
        super().setUp()

    def tearDown(self) -> None:
        async def close() -> None:
            for connection in self.open:
                connection.close()

        self.io_loop.run_sync(close)
        super().tearDown()

    def listen(self, port: int | None = None) -> None:
        """Serve the recipe instead of the ordinary server."""
        self.server = fresh_server(self.recipe)
        listener, self.port = bind_unused_port()
        self.http_server = HTTPServer(make_app(self.server), idle_connection_timeout=10)
        self.http_server.add_socket(listener)
        self.url = f"ws://127.0.0.1:{self.port}/websocket"

    async def connect(self, query: str = "") -> WebSocketClientConnection:
        """Connect, and close in the end."""
        connection = await websocket_connect(self.url + query)
        self.open.append(connection)
        return connection

    async def read(self, connection: WebSocketClientConnection) -> dict[str, Any]:
        """Read one message."""
        message = await connection.read_message()
        assert isinstance(message, str)
        decoded: dict[str, Any] = json.loads(message)
        return decoded

    async def slow_reader(self) -> IOStream:
        """Connect with small buffers at both ends, and read nothing after the first message."""
        before = set(self.server.clients)
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream = IOStream(raw)
        self.open.append(stream)
        await stream.connect(("127.0.0.1", self.port))
        await stream.write(HANDSHAKE)
        await stream.read_until(b"\r\n\r\n")
        (handler,) = set(self.server.clients) - before
        assert handler.ws_connection is not None
        peer: Any = handler.ws_connection
        peer.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await self.frame(stream)
        return stream

    async def frame(self, stream: IOStream) -> dict[str, Any]:
        """Read one frame from the server; its length takes as few bytes as it can."""
        first, size = await stream.read_bytes(2)
        self.assertEqual(first, 0x81)
        if size == 126:
            size = int.from_bytes(await stream.read_bytes(2))
            self.assertGreater(size, 125)
        elif size == 127:
            size = int.from_bytes(await stream.read_bytes(8))
            self.assertGreater(size, 65_535)
        decoded: dict[str, Any] = json.loads(await stream.read_bytes(size))
        return decoded

    @gen_test
    async def test_first_message_comes_at_once_even_when_empty(self) -> None:
        """A client gets one empty message at once, and then the samples as they come."""
        connection = await self.connect()
        self.assertEqual((await self.read(connection))["samples"], [])
        self.server.send_message([1])
        self.assertEqual((await self.read(connection))["samples"], [1])

    @gen_test
    async def test_lengths_of_all_three_forms(self) -> None:
        """Messages around 126 and 65,536 bytes arrive whole, with the header that RFC 6455 wants."""
        stream = await self.slow_reader()
        connection = await self.connect()
        await self.read(connection)
        empty = len(self.server.message(0, 0)) + len('""')  # one sample, a string of no characters
        for size in (100, 124, 125, 126, 127, 65_534, 65_535, 65_536, 65_537, 1_000_000):
            digits = len(str(self.server.end)) - 1
            sample = "x" * (size - empty - digits)
            self.server.send_message([sample])
            self.assertEqual(len(self.server.message(self.server.end - 1, self.server.end)), size)
            self.assertEqual((await self.frame(stream))["samples"], [sample])
            self.assertEqual((await self.read(connection))["samples"], [sample])

    @gen_test
    async def test_slow_reader_gets_everything_in_few_messages(self) -> None:
        """A client that does not read has one unfinished write; its next message has all since."""
        stream = await self.slow_reader()
        connection = await self.connect()
        await self.read(connection)
        (slow,) = (c for c in self.server.clients if c.request.headers["Host"] == "localhost")
        for number in range(200):
            self.server.send_message([f"{number:04}" + "x" * 20_000])
            await self.read(connection)
        peer: Any = slow.ws_connection
        self.assertTrue(peer.stream.writing())
        self.assertLess(len(peer.stream._write_buffer), 3 * 20_050)
        self.assertLess(slow.position, 200)
        numbers: list[int] = []
        messages = 0
        while len(numbers) < 200:
            message = await self.frame(stream)
            self.assertEqual(message["offset"], len(numbers))
            numbers += [int(sample[:4]) for sample in message["samples"]]
            messages += 1
        self.assertEqual(numbers, list(range(200)))
        self.assertLess(messages, 100)

    @gen_test
    async def test_reader_beyond_the_history_is_told_by_a_jump(self) -> None:
        """A client that falls out of the history gets a message whose offset jumps, and goes on."""
        self.server.history_size = 10
        stream = await self.slow_reader()
        for number in range(300):
            self.server.send_message([f"{number:04}" + "x" * 20_000])
        position = missed = 0
        while position < 300:
            message = await self.frame(stream)
            self.assertGreaterEqual(message["offset"], position)
            missed += message["offset"] - position
            position = message["offset"] + len(message["samples"])
            self.assertEqual(int(message["samples"][-1][:4]), position - 1)
            self.assertLessEqual(len(message["samples"]), 10)
        self.assertGreater(missed, 0)

    @gen_test
    async def test_late_joiner_and_resumer_agree_with_the_first_client(self) -> None:
        """Our client, one that joins late and one that resumes count the same samples."""
        first, second = WebSocketClient(self.url, 0.01), WebSocketClient(self.url, 0.01)
        self.follow(first)
        await until(lambda: self.server.clients)
        for number in range(500):
            self.server.send_message([number % 3 % 2])
            if number == 250:
                self.follow(second)
                await until(lambda: second.epoch)
            if number in (100, 300):
                for handler in list(self.server.clients):
                    handler.close(1001, "going away")
            if number % 7 == 0:
                await asyncio.sleep(0)
        await until(lambda: first.position == second.position == 500)
        self.assertEqual(first.posterior, second.posterior)
        self.assertEqual((first.posterior.trials, first.missed, second.missed), (500, 0, 0))

    @gen_test
    async def test_resumes_exactly_at_its_position(self) -> None:
        """A client that names its position starts there, and gets no sample twice."""
        self.server.send_message([0, 1, 2, 3])
        resumed = await self.connect(f"?epoch={self.server.epoch}&offset=3")
        self.assertEqual(await self.read(resumed) | {"epoch": ""}, message("", 3, [3]))
        at_end = await self.connect(f"?epoch={self.server.epoch}&offset=4")
        self.assertEqual(await self.read(at_end) | {"epoch": ""}, message("", 4, []))
        self.server.send_message([4])
        for connection in resumed, at_end:
            self.assertEqual(await self.read(connection) | {"epoch": ""}, message("", 4, [4]))

    @gen_test
    async def test_closing_client_is_passed_over(self) -> None:
        """No frame follows a Close frame, and the others miss nothing."""
        stream = await self.slow_reader()
        connection = await self.connect()
        await self.read(connection)
        (closing,) = (c for c in self.server.clients if c.request.headers["Host"] == "localhost")
        closing.close(1001, "going away")
        for number in range(10):
            self.server.send_message([number])
            self.assertEqual((await self.read(connection))["samples"], [number])
        first, size = await stream.read_bytes(2)
        self.assertEqual(first, 0x88)
        await stream.read_bytes(size)
        stream.close()
        await until(lambda: len(self.server.clients) == 1)

    @gen_test
    async def test_dead_client_costs_the_others_nothing(self) -> None:
        """A client whose connection is reset disappears; the others get every sample."""
        stream = await self.slow_reader()
        connection = await self.connect()
        await self.read(connection)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        stream.close()
        for number in range(10):
            self.server.send_message([number])
            self.assertEqual((await self.read(connection))["samples"], [number])
        await until(lambda: len(self.server.clients) == 1)

    @gen_test
    async def test_socket_closed_in_the_same_turn(self) -> None:
        """A stream that was closed a moment ago, before its handler knows, raises nothing."""
        connection, other = await self.connect(), await self.connect()
        await self.read(connection)
        await self.read(other)
        victim = next(iter(self.server.clients))
        peer: Any = victim.ws_connection
        peer.stream.close()
        self.server.send_message([1])
        await until(lambda: len(self.server.clients) == 1)
        self.server.send_message([1])
        (survivor,) = self.server.clients
        self.assertEqual(survivor.position, 2)


def message(epoch: str, offset: int, samples: list[Any]) -> dict[str, Any]:
    """Return a message of the protocol."""
    return {"epoch": epoch, "offset": offset, "samples": samples}
