"""The server keeps every rule of the protocol, whatever its clients do."""

import asyncio
import contextlib
import gc
import io
import json
import math
import socket
import ssl
import unittest
import warnings
from typing import Any, ClassVar, cast
from unittest import mock

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.httputil import url_concat
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

    def test_is_exact_at_both_ends(self) -> None:
        """With p = 0 every sample is 0, and with p = 1 every sample is 1."""
        for draw in (0.0, math.nextafter(1, 0)):  # the ends of what random.random() returns
            with mock.patch("random.random", return_value=draw):
                for p in (0, 1):
                    self.assertEqual(RandomBernoulli(p).sample(), p)

    def test_shows_1_with_probability_p(self) -> None:
        """Of 100,000 samples, the share of 1s is within six standard deviations of p."""
        p, n = 0.72, 100_000
        ones = sum(RandomBernoulli(p).sample() for _ in range(n))
        self.assertLess(abs(ones - n * p), 6 * math.sqrt(n * p * (1 - p)))


class ServerCase(PairCase):
    """A fresh server, and connections to it that are closed at the end."""

    def setUp(self) -> None:
        super().setUp()
        self.connections: list[WebSocketClientConnection] = []

    def tearDown(self) -> None:
        for connection in self.connections:
            connection.close()
        super().tearDown()

    async def connect(self, url: str = "", **query: str) -> WebSocketClientConnection:
        url = url_concat(url or self.url, query)
        connection = await websocket_connect(url, max_message_size=2**30)
        self.connections.append(connection)
        return connection

    async def read(self, connection: WebSocketClientConnection) -> tuple[int, list[Any]]:
        """Read one message, and return its offset and samples."""
        text = await connection.read_message()
        self.assertIsInstance(text, str)
        message = json.loads(cast(str, text))
        self.assertEqual(list(message), ["epoch", "offset", "samples"])
        self.assertEqual(message["epoch"], self.server.epoch)
        return message["offset"], message["samples"]

    async def ready(self, count: int = 1) -> list[WebSocketClientConnection]:
        """Connect so many clients that have read their first message, with no write unfinished."""
        connections = [await self.connect() for _ in range(count)]
        for connection in connections:
            self.assertEqual(await self.read(connection), (self.server.end, []))
        await until(lambda: not any(client.writing for client in self.server.clients))
        return connections

    async def stuck(self) -> WebSocketClientConnection:
        """Connect a client that does not read, and let the write of sample 1 stay unfinished."""
        slow = await self.connect()  # whose first message waits in Tornado's queue of one
        (client,) = self.server.clients
        await until(lambda: not client.writing)
        self.server.send_message([0])  # waits for room in that queue
        await until(lambda: not client.writing)
        self.server.send_message(["x" * 30_000_000])  # more than the buffers of a connection hold
        return slow


class ConnectingTests(ServerCase):
    attributes: ClassVar[dict[str, Any]] = {"history_size": 10}

    def setUp(self) -> None:
        super().setUp()
        self.everything = (5, [*range(5, 15)])  # what the history has of 15 samples

        async def send() -> None:
            self.server.send_message(list(range(15)))

        self.io_loop.run_sync(send)

    async def first(self, **query: str) -> tuple[int, list[Any]]:
        """Connect, and return what the first message has."""
        return await self.read(await self.connect(**query))

    async def refused(self, query: str, **headers: str) -> str:
        """Return the reason why a connection is refused."""
        with self.assertRaises(HTTPClientError) as caught:
            await websocket_connect(HTTPRequest(self.url + query, headers=headers))
        return str(caught.exception)

    @gen_test
    async def test_joins_at_the_oldest_sample(self) -> None:
        """No epoch, or another one, however odd: the history, whatever the offset beside it."""
        self.assertEqual(await self.first(), self.everything)
        self.assertEqual(await self.first(url=self.url + "/"), self.everything)
        self.assertEqual(await self.first(offset="7"), self.everything)
        for epoch in ("00000000", "x" * 5_000, "", "\0", "١"):
            for offset in ("12", "999", "abc", "-1"):
                with self.subTest(epoch=epoch[:10], offset=offset):
                    query = {"epoch": epoch, "offset": offset}
                    self.assertEqual(await self.first(**query), self.everything)
        self.assertEqual(await self.first(url=self.url + "?epoch=%FF&offset=12"), self.everything)

    @gen_test
    async def test_resumes_exactly_at_the_offset(self) -> None:
        """This epoch and an offset from the oldest sample to the end: the stream starts there."""
        for offset in range(5, 16):
            for text in (str(offset), f"{offset:015}"):
                got = await self.first(epoch=self.server.epoch, offset=text)
                self.assertEqual(got, (offset, [*range(offset, 15)]))

    @gen_test
    async def test_jumps_to_the_oldest_sample_after_a_long_absence(self) -> None:
        """This epoch and an offset before the history: the message's offset has jumped."""
        for offset in ("0", "4"):
            got = await self.first(epoch=self.server.epoch, offset=offset)
            self.assertEqual(got, self.everything)

    @gen_test
    async def test_refuses_an_offset_that_no_client_can_have(self) -> None:
        """This epoch, and no number from 0 to the end in 1 to 15 digits: 400 with the reason."""
        odd = ["", "-1", "abc", "1_0", "+1", "1.0", "1e1", "%201", "%200%20", "%D9%A1", "%FF"]
        odd += ["%00", "16", "9" * 15, "1" * 16, "0" * 18 + "1", "1" * 5_000, "%C2%B2"]
        for offset in [None, *odd]:
            query = f"?epoch={self.server.epoch}"
            with self.subTest(offset=offset and offset[:20]), ExpectLog("tornado.access", "400"):
                reason = await self.refused(query if offset is None else f"{query}&offset={offset}")
                self.assertEqual(reason, "HTTP 400: offset must be a number from 0 to 15")

    @gen_test
    async def test_refuses_more_clients_than_max_clients(self) -> None:
        """One client more than max_clients: 503 with a reason, until another one has gone."""
        self.server.max_clients = 2
        connections = [await self.connect(), await self.connect()]
        with ExpectLog("tornado.access", "503"):
            self.assertEqual(await self.refused(""), "HTTP 503: too many clients")
        connections[0].close()
        await until(lambda: len(self.server.clients) == 1)
        self.assertEqual(await self.first(), self.everything)

    @gen_test
    async def test_refuses_a_foreign_origin(self) -> None:
        """A page from elsewhere gets 403, and a page of the server's own gets the stream."""
        with ExpectLog("tornado.access", "403"):
            self.assertIn("403", await self.refused("", Origin="http://evil.example"))
        own = HTTPRequest(self.url, headers={"Origin": f"http://127.0.0.1:{self.port}"})
        self.connections.append(await websocket_connect(own))
        self.assertEqual(await self.read(self.connections[0]), self.everything)

    @gen_test
    async def test_refuses_what_is_not_a_websocket_request(self) -> None:
        """GET, POST, another path, another version, no key: 400, 405, 404, 426, 400."""
        lines = HANDSHAKE.decode().strip().split("\r\n")[1:]
        upgrade = dict(line.split(": ") for line in lines)
        no_key = {name: text for name, text in upgrade.items() if "Key" not in name}
        for code, path, method, headers in (
            (400, "/websocket", "GET", {}),
            (405, "/websocket", "POST", upgrade),
            (404, "/elsewhere", "GET", upgrade),
            (426, "/websocket", "GET", upgrade | {"Sec-WebSocket-Version": "8"}),
            (400, "/websocket", "GET", no_key),
        ):
            url, body = f"http://127.0.0.1:{self.port}{path}", "" if method == "POST" else None
            with self.subTest(code=code, path=path), ExpectLog("tornado.access", str(code)):
                request = HTTPRequest(url, method=method, headers=headers, body=body)
                response = await AsyncHTTPClient().fetch(request, raise_error=False)
                self.assertEqual(response.code, code)


class MessageTests(ServerCase):
    attributes: ClassVar[dict[str, Any]] = {"history_size": 100}

    @gen_test
    async def test_every_client_gets_every_sample(self) -> None:
        """The first message comes at once, though empty; then each one reaches each client once."""
        connections = await self.ready(5)
        for offset in range(20):
            self.server.send_message([offset])
            for connection in connections:
                self.assertEqual(await self.read(connection), (offset, [offset]))

    @gen_test
    async def test_a_backlog_comes_in_several_messages(self) -> None:
        """A client that lacks more than message_size samples gets them that many at a time."""
        self.server.message_size = 40
        self.server.send_message(list(range(100)))
        connection = await self.connect()
        for start, end in ((0, 40), (40, 80), (80, 100)):
            self.assertEqual(await self.read(connection), (start, [*range(start, end)]))

    @gen_test
    async def test_batches_at_once_reach_a_ready_client(self) -> None:
        """The first of many batches in one turn goes out alone, all others follow together."""
        (connection,) = await self.ready()
        for sample in range(10):
            self.server.send_message([sample])
        self.assertEqual(await self.read(connection), (0, [0]))
        self.assertEqual(await self.read(connection), (1, [*range(1, 10)]))

    @gen_test
    async def test_a_sample_is_whatever_json_can_hold(self) -> None:
        """Strings, lists, objects, null and floats travel as they are."""
        samples = ["ä\u2028\ud800", [1, [2]], {"a": None}, 1.5, True, 10**30]
        (connection,) = await self.ready()
        self.server.send_message(samples)
        self.assertEqual(await self.read(connection), (0, samples))

    @gen_test
    async def test_what_is_refused_changes_nothing(self) -> None:
        """No list, or not JSON: TypeError or ValueError, and the log stays as it was."""
        (connection,) = await self.ready()
        refused: Any
        for refused in ({"place": "roof"}, "110", (1, 0), None, [0, {1}], [b"bytes"]):
            with self.subTest(refused=refused), self.assertRaises(TypeError):
                self.server.send_message(refused)
        for number in (math.nan, math.inf):
            with self.subTest(number=number), self.assertRaises(ValueError):
                self.server.send_message([0, number])
        self.assertEqual((self.server.history, self.server.end), ([], 0))
        for samples in ([], [7]):  # no samples make no message
            self.server.send_message(samples)
        self.assertEqual(await self.read(connection), (0, [7]))

    @gen_test
    async def test_the_log_keeps_what_was_sent(self) -> None:
        """A dict that is changed after it was sent is, for a late joiner, what it was."""
        sample = {"n": 0}
        for n in range(4):
            sample["n"] = n
            self.server.send_message([sample])
        got = await self.read(await self.connect())
        self.assertEqual(got, (0, [{"n": n} for n in range(4)]))

    @gen_test
    async def test_another_thread_is_refused(self) -> None:
        """Outside the event loop's thread: RuntimeError at the first call, and nothing is sent."""
        with self.assertRaises(RuntimeError):
            await asyncio.to_thread(self.server.send_message, [1])
        self.assertEqual((self.server.history, self.server.end), ([], 0))

    @gen_test
    async def test_history_is_bounded(self) -> None:
        """The history holds the newest history_size samples; more at once, and offset jumps."""
        (connection,) = await self.ready()
        self.server.send_message(list(range(250)))
        self.assertEqual(await self.read(connection), (150, [*range(150, 250)]))
        for sample in range(250, 1_000):
            self.server.send_message([sample])
        self.assertEqual((self.server.history, self.server.end), ([*range(900, 1_000)], 1_000))


class SlowClientTests(ServerCase):
    @gen_test
    async def test_gets_fewer_larger_messages(self) -> None:
        """While a write is unfinished there is no other; what came since follows in one message."""
        slow = await self.stuck()
        for sample in range(50):
            self.server.send_message([sample])
            await asyncio.sleep(0)
        (client,) = self.server.clients
        self.assertEqual((client.position, client.writing), (2, True))
        got = [await self.read(slow) for _ in range(4)]
        self.assertEqual([offset for offset, _ in got[:3]], [0, 0, 1])
        self.assertEqual(got[3], (2, [*range(50)]))

    @gen_test
    async def test_sees_a_jump_when_it_fell_out_of_the_history(self) -> None:
        """The message after the unfinished write begins at the oldest sample that is kept."""
        self.server.history_size = 10
        slow = await self.stuck()
        for sample in range(50):
            self.server.send_message([sample])
        got = [await self.read(slow) for _ in range(4)]
        self.assertEqual(got[3], (42, [*range(40, 50)]))

    @gen_test
    async def test_costs_the_others_nothing(self) -> None:
        """Beside a client that does not read, a healthy one gets each sample in its own message."""
        await self.stuck()
        healthy = await self.connect(epoch=self.server.epoch, offset="2")
        self.assertEqual(await self.read(healthy), (2, []))
        for offset in range(2, 100):
            self.server.send_message([offset])
            self.assertEqual(await self.read(healthy), (offset, [offset]))


class BadClientTests(ServerCase):
    @gen_test
    async def test_a_client_that_speaks_is_closed(self) -> None:
        """Text, binary or empty: 1008, since the stream is read-only; more than 1 KiB: 1009."""
        speech: list[str | bytes] = ["hello", b"\x00", "", "x" * 1_024, "x" * 1_025]
        for message in speech:
            (connection,) = await self.ready()
            await connection.write_message(message, binary=isinstance(message, bytes))
            self.assertIsNone(await connection.read_message())
            code = 1009 if len(message) > 1_024 else 1008
            self.assertEqual(connection.close_code, code)
            reason = "this stream is read-only" if code == 1008 else "message too big"
            self.assertEqual(connection.close_reason, reason)
            await until(lambda: not self.server.clients)

    @gen_test
    async def test_a_closing_client_costs_the_others_nothing(self) -> None:
        """While some clients are being closed the others get each sample, and nothing is logged."""
        connections = await self.ready(5)
        for client in list(self.server.clients)[:2]:
            client.close()
        with self.assertNoLogs(level="WARNING"):
            for sample in range(3):
                self.server.send_message([sample])
            self.assertEqual(len(self.server.clients), 5)  # they count until the socket is closed
            got = [await connection.read_message() for connection in connections]
        self.assertEqual(sum(message is not None for message in got), 3)

    @gen_test
    async def test_a_write_that_raises_drops_that_client_only(self) -> None:
        """Whatever one client's write raises, it is dropped with one line; the others go on."""
        connections = await self.ready(3)
        bad = next(iter(self.server.clients))
        broken = mock.patch.object(bad, "write_message", side_effect=RuntimeError("broken"))
        with broken, self.assertLogs("server", "WARNING") as logs:
            for sample in range(2):
                self.server.send_message([sample])
        (line,) = logs.output
        self.assertRegex(line, r"^WARNING:server:client \S+ dropped: RuntimeError\('broken'\)$")
        got = [await connection.read_message() for connection in connections]
        self.assertEqual(sum(message is not None for message in got), 2)
        await until(lambda: len(self.server.clients) == 2)

    @gen_test
    async def test_reset_clients_are_forgotten_quietly(self) -> None:
        """Connections that are reset, with writes unfinished, leave no client and no log."""
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
        settings = make_app().settings
        self.assertEqual(settings["websocket_ping_interval"], 10)
        self.assertEqual(settings["websocket_ping_timeout"], 10)

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
        early = [await self.connect(f"ws://{address}/{path}") for path in "ab"]
        for stream, connection in zip((A, B), early, strict=True):
            self.server = stream  # which read expects
            self.assertEqual(await self.read(connection), (0, []))
        await until(lambda: not any(client.writing for client in WebSocketServer.clients))
        A.send_message([1])
        B.send_message([2, 3])
        late = [await self.connect(f"ws://{address}/{path}") for path in "ab"]
        for index, stream in enumerate((A, B)):
            self.server = stream
            for connection in (early[index], late[index]):
                self.assertEqual(await self.read(connection), (0, [[1], [2, 3]][index]))
        self.assertEqual((WebSocketServer.end, WebSocketServer.history), (0, []))


class ServeTests(ServerCase):
    async def begin(self, **options: Any) -> tuple[asyncio.Task[None], str]:
        """Serve a fresh stream on a free port, and return the task and the URL it has printed."""
        self.server = fresh_server(clients=WebSocketServer.clients)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            task = asyncio.ensure_future(serve(make_app(self.server), 0, **options))
            await until(output.getvalue)
        self.following.append(task)
        self.assertRegex(output.getvalue(), r"^wss?://\S+:\d+/websocket\n$")
        return task, output.getvalue().rstrip()

    @gen_test
    async def test_refuses_what_it_cannot_listen_on(self) -> None:
        """An empty address or a port out of range: ValueError, with both in its text."""
        for port, address in ((0, ""), (-1, "localhost"), (65_536, "localhost")):
            with self.assertRaisesRegex(ValueError, f"{address!r}, {port}"):
                await serve(make_app(), port, address)

    @gen_test
    async def test_an_error_names_address_and_port(self) -> None:
        """A port in use, or an address that is not here, ends the program with one line."""
        hosts = {"127.0.0.1": "127.0.0.1", "2001:db8::1": r"\[2001:db8::1\]", "a..b": "a..b"}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Tornado forgets that socket
            for host, text in hosts.items():
                with self.assertRaisesRegex(SystemExit, f"^cannot listen on {text}:{self.port}: "):
                    await serve(make_app(), self.port, host)
            gc.collect()

    @gen_test
    async def test_listens_on_localhost_only(self) -> None:
        """By default the server is reached through the loopback interface only."""
        _, url = await self.begin()
        self.assertRegex(url, r"^ws://localhost:\d+/websocket$")
        self.assertEqual(await self.read(await self.connect(url)), (0, []))
        with socket.socket() as probe, self.assertRaises(OSError):
            # An address that only "every interface" has.
            probe.connect(("127.0.0.2", int(url.split(":")[2].split("/")[0])))

    @gen_test
    async def test_ssl_options_make_it_wss(self) -> None:
        """With ssl_options the URL begins with wss, and who does not speak TLS is refused."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        _, url = await self.begin(ssl_options=context)
        self.assertRegex(url, r"^wss://localhost:\d+/websocket$")
        log = ExpectLog("tornado.general", "SSL Error", required=False)
        with log, self.assertRaises((HTTPClientError, OSError)):
            await self.connect(url.replace("wss", "ws"))

    @gen_test
    async def test_says_goodbye_to_all_at_the_same_offset(self) -> None:
        """Cancelled, it tells all clients 1001, those behind an unfinished write, too."""
        task, self.url = await self.begin()
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
            self.assertEqual(connection.close_code, 1001)
            self.assertEqual(connection.close_reason, "going away")
        with self.assertRaises(asyncio.CancelledError):
            await task
        self.assertEqual(WebSocketServer.clients, set())
        with self.assertRaises(OSError):
            await self.connect()


if __name__ == "__main__":
    unittest.main()
