"""The protocol from the server's side: positions, messages, slow and closing clients, and `serve`.

Hostile requests, frames and networks are left to test_faults.py.
"""

import asyncio
import contextlib
import gc
import io
import json
import math
import socket
import ssl
import sys
import unittest
import warnings
from typing import Any, ClassVar
from unittest import mock

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.testing import ExpectLog, gen_test
from tornado.web import Application
from tornado.websocket import WebSocketClientConnection, websocket_connect

from server import RandomBernoulli, WebSocketServer, make_app, serve
from tests.support import HANDSHAKE, PairCase, fresh_server, until


class RandomBernoulliTests(unittest.TestCase):
    def test_refuses_what_is_no_probability(self) -> None:
        """A p outside 0..1, or nan, is a ValueError that names it."""
        for p in (-0.1, 1.1, math.nan, math.inf, -math.inf):
            with self.subTest(p=p), self.assertRaisesRegex(ValueError, str(p)):
                RandomBernoulli(p)

    def test_shows_1_with_probability_p(self) -> None:
        """The share of 1s is within six standard deviations of p, and exact at both ends."""
        p, n = 0.72, 100_000
        ones = sum(RandomBernoulli(p).sample() for _ in range(n))
        self.assertLess(abs(ones - n * p), 6 * math.sqrt(n * p * (1 - p)))
        for draw in (0.0, math.nextafter(1, 0)):  # the ends of what random.random() returns
            with mock.patch("random.random", return_value=draw):
                self.assertEqual([RandomBernoulli(p).sample() for p in (0, 1)], [0, 1])


class ServerCase(PairCase):
    """A fresh server, and connections to it that are closed at the end."""

    unread = True

    def setUp(self) -> None:
        super().setUp()
        self.connections: list[WebSocketClientConnection] = []

    def tearDown(self) -> None:
        for connection in self.connections:
            connection.close()
        super().tearDown()

    async def connect(
        self, query: str = "", url: str = "", **options: Any
    ) -> WebSocketClientConnection:
        request = HTTPRequest((url or self.url) + query, **options)
        connection = await websocket_connect(request, max_message_size=2**30)
        self.connections.append(connection)
        return connection

    async def read(self, connection: WebSocketClientConnection) -> tuple[int, list[Any]]:
        """Read one message, and return its offset and samples."""
        text = await connection.read_message()
        assert isinstance(text, str)
        message = json.loads(text)
        self.assertEqual(list(message), ["epoch", "offset", "samples"])
        self.assertEqual(message["epoch"], self.server.epoch)
        return message["offset"], message["samples"]

    async def begin(self, **options: Any) -> asyncio.Task[None]:
        """Serve a fresh stream on a free port, and take the URL that it prints."""
        self.server = fresh_server(**self.attributes, clients=WebSocketServer.clients)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            task = asyncio.ensure_future(serve(make_app(self.server), 0, **options))
            await until(output.getvalue)
        self.following.append(task)
        self.assertRegex(output.getvalue(), r"^wss?://localhost:\d+/websocket\n$")
        self.url = output.getvalue().rstrip()
        return task

    async def written(self) -> None:
        """Wait until no write to a client is unfinished."""
        await until(lambda: not any(client.writing for client in self.server.clients))

    async def ready(self, count: int = 1, **options: Any) -> list[WebSocketClientConnection]:
        """Connect so many clients that have read their first message."""
        connections = [await self.connect(**options) for _ in range(count)]
        for connection in connections:
            self.assertEqual(await self.read(connection), (self.server.end, []))
        await self.written()
        return connections

    async def stuck(self) -> WebSocketClientConnection:
        """Connect a client that does not read, and let the write of sample 1 stay unfinished."""
        slow = await self.connect()  # whose first message waits in Tornado's queue of one
        await self.written()
        self.server.send_message([0])  # waits for room in that queue
        await self.written()
        self.server.send_message(["x" * 30_000_000])  # more than the buffers of a connection hold
        return slow


class ConnectingTests(ServerCase):
    attributes: ClassVar[dict[str, Any]] = {"history_size": 10}

    async def refused(self, query: str, code: int) -> str:
        """Return the reason why a connection is refused with this code."""
        with (
            ExpectLog("tornado.access", str(code)),
            self.assertRaisesRegex(HTTPClientError, f"HTTP {code}: ") as caught,
        ):
            await self.connect(query)
        return str(caught.exception).partition(": ")[2]

    @gen_test
    async def test_starts_where_the_url_says(self) -> None:
        """This epoch: at the offset, or the oldest sample after it; else at the oldest sample."""
        self.server.send_message(list(range(15)))
        starts = {"": 5, "/": 5, "?offset=7": 5, "?epoch=%FF&offset=12": 5}
        for epoch in ("00000000", "x" * 5_000, "", "%00", "%D9%A1"):
            starts |= {f"?epoch={epoch}&offset={text}": 5 for text in ("12", "999", "abc", "-1")}
        for offset in range(16):
            for text in (str(offset), f"{offset:015}"):
                starts[f"?epoch={self.server.epoch}&offset={text}"] = max(5, offset)
        for query, start in starts.items():
            with self.subTest(query=query[:40]):
                got = await self.read(await self.connect(query))
                self.assertEqual(got, (start, [*range(start, 15)]))

    @gen_test
    async def test_refuses_an_offset_that_no_client_can_have(self) -> None:
        """This epoch, and no number from 0 to the end in 1 to 15 digits: 400 with the reason."""
        self.server.send_message(list(range(15)))
        odd = ["", "-1", "abc", "1_0", "+1", "1.0", "1e1", "%201", "%200%20", "%D9%A1", "%FF"]
        odd += ["%00", "16", "9" * 15, "1" * 16, "0" * 15 + "1", "1" * 5_000, "%C2%B2"]
        for offset in ["", *(f"&offset={text}" for text in odd)]:
            with self.subTest(offset=offset[:20]):
                reason = await self.refused(f"?epoch={self.server.epoch}{offset}", 400)
                self.assertEqual(reason, "offset must be a number from 0 to 15")

    @gen_test
    async def test_refuses_more_clients_than_max_clients(self) -> None:
        """One client more than max_clients: 503 with a reason, until another one has gone."""
        self.server.max_clients = 2
        connections = await self.ready(2)
        self.assertEqual(await self.refused("", 503), "too many clients")
        connections[0].close()
        await until(lambda: len(self.server.clients) == 1)
        await self.ready()


class MessageTests(ServerCase):
    attributes: ClassVar[dict[str, Any]] = {"history_size": 100, "message_size": 40}

    @gen_test
    async def test_every_client_gets_every_sample(self) -> None:
        """Each comes once, at once; of many in one turn the first is alone, the rest together."""
        connections = await self.ready(5)
        for offset in range(20):
            self.server.send_message([offset])
            for connection in connections:
                self.assertEqual(await self.read(connection), (offset, [offset]))
        await self.written()
        for sample in range(20, 30):
            self.server.send_message([sample])
        for connection in connections:
            self.assertEqual(await self.read(connection), (20, [20]))
            self.assertEqual(await self.read(connection), (21, [*range(21, 30)]))

    @gen_test
    async def test_history_and_messages_are_bounded(self) -> None:
        """The newest history_size samples are kept, and come message_size at a time."""
        (early,) = await self.ready()
        self.server.send_message(list(range(250)))
        for connection in (early, await self.connect()):
            for start, end in ((150, 190), (190, 230), (230, 250)):
                self.assertEqual(await self.read(connection), (start, [*range(start, end)]))
        for sample in range(250, 1_000):
            self.server.send_message([sample])
        self.assertEqual((self.server.history, self.server.end), ([*range(900, 1_000)], 1_000))

    @gen_test
    async def test_the_log_keeps_its_own_copy(self) -> None:
        """A sample is whatever JSON can hold, and stays for late joiners what it was when sent."""
        (early,) = await self.ready()
        samples = ["ä\u2028\ud800", [1, [2]], {"a": None}, 1.5, True, 10**30]
        expected = json.loads(json.dumps(samples))
        self.server.send_message(samples)
        samples[1].append(3)  # type: ignore[attr-defined]
        samples.clear()
        for connection in (early, await self.connect()):
            self.assertEqual(await self.read(connection), (0, expected))

    @gen_test
    async def test_what_is_refused_changes_nothing(self) -> None:
        """No list, not JSON, another thread: an error, and the log stays as it was."""
        (connection,) = await self.ready()
        refused: Any
        for refused in ({"place": "roof"}, "110", (1, 0), None, [0, {1}], [b"bytes"]):
            with self.subTest(refused=refused), self.assertRaises(TypeError):
                self.server.send_message(refused)
        for number in (math.nan, math.inf):
            with self.subTest(number=number), self.assertRaises(ValueError):
                self.server.send_message([0, number])
        with self.assertRaises(RuntimeError):
            await asyncio.to_thread(self.server.send_message, [1])
        self.assertEqual((self.server.history, self.server.end), ([], 0))
        for samples in ([], [7]):  # no samples make no message
            self.server.send_message(samples)
        self.assertEqual(await self.read(connection), (0, [7]))


class SlowClientTests(ServerCase):
    @gen_test
    async def test_gets_what_came_meanwhile_in_one_message(self) -> None:
        """Passed over while a write is unfinished, it costs others nothing, and may see a jump."""
        for size, rest in ((10_000, (2, [*range(2, 50)])), (10, (40, [*range(40, 50)]))):
            await self.restart()
            self.server.history_size = size
            slow = await self.stuck()
            (client,) = self.server.clients
            healthy = await self.connect(f"?epoch={self.server.epoch}&offset=2")
            self.assertEqual(await self.read(healthy), (2, []))
            for offset in range(2, 50):
                self.server.send_message([offset])
                self.assertEqual(await self.read(healthy), (offset, [offset]))
            self.assertEqual((client.position, client.writing), (2, True))
            got = [await self.read(slow) for _ in range(4)]
            self.assertEqual([offset for offset, _ in got[:3]], [0, 0, 1])
            self.assertEqual(got[3], rest)

    @gen_test
    async def test_a_cancelled_write_leaves_no_traceback(self) -> None:
        """As when the event loop ends; the client is no longer passed over."""
        await self.ready()
        (client,) = self.server.clients
        future = asyncio.get_running_loop().create_future()
        with mock.patch.object(client, "write_message", return_value=future):
            self.server.send_message([1])
        future.cancel()
        await until(lambda: not client.writing)


class BadClientTests(ServerCase):
    @gen_test
    async def test_a_client_that_speaks_is_closed(self) -> None:
        """Text, binary or empty: 1008, since the stream is read-only; more than 1 KiB: 1009."""
        read_only, too_big = (1008, "this stream is read-only"), (1009, "message too big")
        speech: list[str | bytes] = ["hello", b"\x00", "", "x" * 1_024, "x" * 1_025]
        for message in speech:
            (connection,) = await self.ready()
            await connection.write_message(message, binary=isinstance(message, bytes))
            self.assertIsNone(await connection.read_message())
            end = connection.close_code, connection.close_reason
            self.assertEqual(end, too_big if len(message) > 1_024 else read_only)
            await until(lambda: not self.server.clients)

    @gen_test
    async def test_what_cannot_be_written_to_costs_the_others_nothing(self) -> None:
        """A closing client is passed over; one whose write raises is dropped with one line."""
        connections = await self.ready(5)
        closing, bad, *_ = self.server.clients
        closing.close()
        broken = mock.patch.object(bad, "write_message", side_effect=RuntimeError("broken"))
        with broken, self.assertLogs("server", "WARNING") as logs:
            for sample in range(3):
                self.server.send_message([sample])
            self.assertEqual(len(self.server.clients), 5)  # they count until the socket is closed
        (line,) = logs.output
        self.assertRegex(line, r"^WARNING:server:client \S+ dropped: RuntimeError\('broken'\)$")
        got = [await connection.read_message() for connection in connections]
        self.assertEqual(sum(message is not None for message in got), 3)
        await until(lambda: len(self.server.clients) == 3)

    @gen_test
    async def test_reset_clients_are_forgotten_quietly(self) -> None:
        """Connections that are reset, with writes unfinished, leave no client and no warning."""
        with self.assertNoLogs(level="WARNING"):
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", self.port)) as peer:
                    peer.sendall(HANDSHAKE)
                    await until(lambda: self.server.clients)
                    self.server.send_message(["x" * 5_000_000])
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                self.server.send_message(["x"])
                await until(lambda: not self.server.clients)


class StreamTests(ServerCase):
    def test_defaults(self) -> None:
        """10,000 samples are kept, 1,000 fit a message, 900 clients may come; pings every 10 s."""
        sizes = WebSocketServer.history_size, WebSocketServer.message_size
        self.assertEqual((*sizes, WebSocketServer.max_clients), (10_000, 1_000, 900))
        self.assertRegex(WebSocketServer.epoch, "^[0-9a-f]{8}$")
        pings = [make_app().settings[f"websocket_ping_{name}"] for name in ("interval", "timeout")]
        self.assertEqual(pings, [10, 10])

    @gen_test
    async def test_each_subclass_is_a_stream_of_its_own(self) -> None:
        """Two subclasses have two epochs and two logs, and feed only clients of their own."""

        class A(WebSocketServer):
            pass

        class B(WebSocketServer):
            epoch = "sensor-b"

        self.assertEqual(B.epoch, "sensor-b")
        self.assertRegex(A.epoch, "^[0-9a-f]{8}$")
        self.assertEqual(len({A.epoch, B.epoch, WebSocketServer.epoch, fresh_server().epoch}), 4)
        address = self.serve(Application([("/a", A), ("/b", B)]))
        streams = ((A, f"ws://{address}/a", [1]), (B, f"ws://{address}/b", [2, 3]))
        early = []
        for self.server, url, _ in streams:  # which read expects
            early.append(await self.connect(url=url))
            self.assertEqual(await self.read(early[-1]), (0, []))
        await self.written()
        for stream, _, samples in streams:
            stream.send_message(samples)
        for (self.server, url, samples), connection in zip(streams, early, strict=True):
            for reader in (connection, await self.connect(url=url)):
                self.assertEqual(await self.read(reader), (0, samples))
        for unused in WebSocketServer, fresh_server(A):
            self.assertEqual((unused.end, unused.history), (0, []))


class ServeTests(ServerCase):
    @gen_test
    async def test_refuses_what_it_cannot_listen_on(self) -> None:
        """Out of range, in use or not here: an error with address and port in its text."""
        for port, address in ((0, ""), (-1, "localhost"), (65_536, "localhost")):
            with self.assertRaisesRegex(ValueError, f"{address!r}, {port}"):
                await serve(make_app(), port, address)
        hosts = {"127.0.0.1": "127.0.0.1", "2001:db8::1": r"\[2001:db8::1\]", "a..b": "a..b"}
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            for host, text in hosts.items():
                expected = f"^cannot serve on {text}:{self.port}: "
                with self.assertRaisesRegex((OSError, SystemExit), expected):
                    await serve(make_app(), self.port, host)
            gc.collect()  # Tornado forgets the socket that it could not bind
        self.assertTrue(sys.stdout)  # who catches the error, as IPython does, can still print
        with mock.patch("tornado.netutil.bind_sockets", side_effect=OSError("busy")):
            for ports, port in (((), 8765), ((65_535,), 65_535)):
                line = f"^cannot serve on localhost:{port}: busy$"
                with self.assertRaisesRegex(SystemExit, line):
                    await serve(make_app(), *ports)

    @gen_test
    async def test_ssl_options_make_it_wss(self) -> None:
        """With ssl_options the URL begins with wss, and who does not speak TLS is refused."""
        await self.begin(ssl_options=ssl.create_default_context(ssl.Purpose.CLIENT_AUTH))
        self.assertRegex(self.url, "^wss:")
        log = ExpectLog("tornado.general", "SSL Error", required=False)
        with log, self.assertRaises((HTTPClientError, OSError)):
            await self.connect(url=self.url.replace("wss", "ws"))

    @gen_test
    async def test_says_goodbye_to_all_at_the_same_offset(self) -> None:
        """Cancelled, it tells all clients 1001, those behind an unfinished write, too."""
        task = await self.begin()
        self.assertRegex(self.url, "^ws:")
        slow = await self.stuck()
        healthy = await self.connect()
        await until(lambda: len(self.server.clients) == 2)
        for sample in range(10):
            self.server.send_message([sample])
        task.cancel()
        for connection in (slow, healthy):
            end = 0
            while text := await connection.read_message():
                message = json.loads(text)
                self.assertEqual(message["offset"], end)
                end += len(message["samples"])
            self.assertEqual(end, 12)
            got = connection.close_code, connection.close_reason
            self.assertEqual(got, (1001, "going away"))
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertEqual(WebSocketServer.clients, set())
        with self.assertRaises(OSError):
            await self.connect()
