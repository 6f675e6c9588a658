"""The server keeps every rule of the protocol, whatever its clients do."""

import asyncio
import json
import math
import socket
import unittest
from typing import Any, cast
from unittest import mock

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.testing import gen_test
from tornado.websocket import WebSocketClientConnection, WebSocketHandler, websocket_connect

from server import RandomBernoulli, WebSocketServer, make_app
from tests.support import PairCase, fresh_server, until

UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    "Sec-WebSocket-Version": "13",
}


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
    """A fresh server, and raw connections to it that are closed at the end."""

    def setUp(self) -> None:
        super().setUp()
        self.connections: list[WebSocketClientConnection] = []
        self.peers: list[socket.socket] = []

    def tearDown(self) -> None:
        for connection in self.connections:
            connection.close()
        for peer in self.peers:
            peer.close()
        super().tearDown()

    async def connect(self, query: str = "") -> WebSocketClientConnection:
        connection = await websocket_connect(self.url + query)
        self.connections.append(connection)
        return connection

    def peer(self, receive_buffer: int = 65_536) -> socket.socket:
        """Connect a client that does only what the test does with its socket."""
        peer = socket.socket()
        self.peers.append(peer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        peer.connect(("127.0.0.1", self.port))
        lines = ["GET /websocket HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {text}" for name, text in UPGRADE.items()]
        peer.sendall("\r\n".join([*lines, "", ""]).encode())
        return peer

    async def read(self, connection: WebSocketClientConnection) -> tuple[int, list[Any]]:
        """Read one message, and return its offset and samples."""
        text = await connection.read_message()
        self.assertIsInstance(text, str)
        message = json.loads(cast(str, text))
        self.assertEqual(list(message), ["epoch", "offset", "samples"])
        self.assertEqual(message["epoch"], self.server.epoch)
        return message["offset"], message["samples"]

    async def first(self, query: str) -> tuple[int, list[Any]]:
        return await self.read(await self.connect(query))

    async def refused(self, query: str, **headers: str) -> HTTPClientError:
        request = HTTPRequest(self.url + query, headers=headers)
        with self.assertRaises(HTTPClientError) as caught:
            await websocket_connect(request)
        return caught.exception


class ConnectingTests(ServerCase):
    attributes = {"history_size": 10}  # noqa: RUF012

    def setUp(self) -> None:
        super().setUp()
        self.server.send_message(list(range(15)))  # 5 to 14 are kept

    @gen_test
    async def test_joins_at_the_oldest_sample_without_a_query(self) -> None:
        """Neither parameter: the stream starts at the oldest sample in the history."""
        self.assertEqual(await self.first(""), (5, list(range(5, 15))))

    @gen_test
    async def test_resumes_exactly_at_the_offset(self) -> None:
        """This epoch and an offset inside the history: the stream starts exactly there."""
        query = f"?epoch={self.server.epoch}&offset="
        for offset in range(5, 15):
            self.assertEqual(await self.first(f"{query}{offset}"), (offset, [*range(offset, 15)]))

    @gen_test
    async def test_resumes_at_the_end_with_an_empty_message(self) -> None:
        """This epoch and the end as offset: the first message comes at once, and is empty."""
        self.assertEqual(await self.first(f"?epoch={self.server.epoch}&offset=15"), (15, []))

    @gen_test
    async def test_jumps_to_the_oldest_sample_after_a_long_absence(self) -> None:
        """This epoch and an offset before the history: the message's offset has jumped."""
        query = f"?epoch={self.server.epoch}&offset=4"
        self.assertEqual(await self.first(query), (5, list(range(5, 15))))

    @gen_test
    async def test_ignores_the_offset_of_another_epoch(self) -> None:
        """Another epoch, however odd: the stream starts at the oldest sample."""
        for epoch in ("00000000", "x" * 5_000, "", "%FF", "%D9%A1"):
            with self.subTest(epoch=epoch[:10]):
                self.assertEqual((await self.first(f"?epoch={epoch}&offset=12"))[0], 5)
                self.assertEqual((await self.first(f"?epoch={epoch}&offset=999"))[0], 5)

    @gen_test
    async def test_refuses_an_offset_beyond_the_end(self) -> None:
        """This epoch and an offset beyond the end: 400, and the reason says where the end is."""
        error = await self.refused(f"?epoch={self.server.epoch}&offset=16")
        self.assertEqual(str(error), "HTTP 400: offset is beyond the end, which is 15")

    @gen_test
    async def test_refuses_half_a_position(self) -> None:
        """Only one of epoch and offset: 400 with a reason."""
        for query in (f"?epoch={self.server.epoch}", "?offset=7"):
            error = await self.refused(query)
            self.assertEqual(str(error), "HTTP 400: epoch and offset go together")

    @gen_test
    async def test_refuses_an_offset_that_is_no_number(self) -> None:
        """Anything but 1 to 15 ASCII digits as offset: 400 with a reason, for any epoch."""
        odd = ["", "-1", "abc", "1_0", "+1", "1.0", "1e1", "%201", "%D9%A1%D9%A2", "%FF", "%00"]
        for offset in [*odd, "1" * 16, "1" * 5_000]:
            for epoch in (self.server.epoch, "00000000"):
                with self.subTest(offset=offset[:20]):
                    error = await self.refused(f"?epoch={epoch}&offset={offset}")
                    self.assertEqual(str(error), "HTTP 400: offset must be 1 to 15 digits")
        self.assertEqual((await self.first("?epoch=00000000&offset=" + "9" * 15))[0], 5)

    @gen_test
    async def test_gives_the_reason_as_text(self) -> None:
        """The reason for a refusal is in the body, for people who look with a browser or curl."""
        error = await self.refused("?offset=7")
        response = error.response
        assert response is not None
        self.assertIn(b"epoch and offset go together", response.body)

    @gen_test
    async def test_accepts_a_trailing_slash(self) -> None:
        """/websocket/ is the same stream as /websocket."""
        self.assertEqual((await self.first("/"))[0], 5)

    @gen_test
    async def test_refuses_more_clients_than_max_clients(self) -> None:
        """One client more than max_clients: 503 with a reason, until another one has gone."""
        self.server.max_clients = 2
        connections = [await self.connect(), await self.connect()]
        with self.assertLogs("tornado.access", "ERROR"):
            self.assertEqual(str(await self.refused("")), "HTTP 503: too many clients")
        connections[0].close()
        await until(lambda: len(self.server.clients) == 1)
        self.assertEqual((await self.first(""))[0], 5)

    @gen_test
    async def test_refuses_a_foreign_origin(self) -> None:
        """A page from elsewhere gets 403, and a page of the server's own gets the stream."""
        error = await self.refused("", Origin="http://evil.example")
        self.assertEqual(error.code, 403)
        own = HTTPRequest(self.url, headers={"Origin": f"http://127.0.0.1:{self.port}"})
        connection = await websocket_connect(own)
        self.connections.append(connection)
        self.assertEqual((await self.read(connection))[0], 5)

    @gen_test
    async def test_refuses_what_is_not_a_websocket_request(self) -> None:
        """GET, POST, another path, another version, no key: 400, 405, 404, 426, 400."""
        http = AsyncHTTPClient()
        url = f"http://127.0.0.1:{self.port}"
        no_key = {name: text for name, text in UPGRADE.items() if "Key" not in name}
        for code, path, method, headers in (
            (400, "/websocket", "GET", {}),
            (405, "/websocket", "POST", UPGRADE),
            (404, "/elsewhere", "GET", UPGRADE),
            (426, "/websocket", "GET", UPGRADE | {"Sec-WebSocket-Version": "8"}),
            (400, "/websocket", "GET", no_key),
        ):
            body = "" if method == "POST" else None
            with self.subTest(code=code, path=path):
                request = HTTPRequest(url + path, method=method, headers=headers, body=body)
                response = await http.fetch(request, raise_error=False)
                self.assertEqual(response.code, code)


class MessageTests(ServerCase):
    attributes = {"history_size": 100}  # noqa: RUF012

    @gen_test
    async def test_first_message_comes_at_once(self) -> None:
        """The first message follows the handshake, even before there is any sample."""
        self.assertEqual(await self.first(""), (0, []))

    @gen_test
    async def test_every_client_gets_every_sample(self) -> None:
        """Each message reaches each client once, in order."""
        connections = [await self.connect() for _ in range(5)]
        for connection in connections:
            self.assertEqual(await self.read(connection), (0, []))
        for offset in range(20):
            self.server.send_message([offset])
            for connection in connections:
                self.assertEqual(await self.read(connection), (offset, [offset]))

    @gen_test
    async def test_several_batches_at_once_reach_a_ready_client(self) -> None:
        """Batches that are sent before the event loop turns are followed by nothing to wait for."""
        connection = await self.connect()
        await self.read(connection)
        for sample in range(10):
            self.server.send_message([sample])
        received: list[int] = []
        while len(received) < 10:
            offset, samples = await self.read(connection)
            self.assertEqual(offset, len(received))
            received += samples
        self.assertEqual(received, list(range(10)))

    @gen_test
    async def test_a_sample_is_whatever_json_can_hold(self) -> None:
        """Strings, lists, objects, null and floats travel as they are."""
        samples = ["ä\u2028\ud800", [1, [2]], {"a": None}, 1.5, True, 10**30]
        connection = await self.connect()
        await self.read(connection)
        self.server.send_message(samples)
        self.assertEqual(await self.read(connection), (0, samples))

    @gen_test
    async def test_a_sample_that_json_cannot_hold_changes_nothing(self) -> None:
        """At a set, nan or inf the caller gets the error, and the log stays as it was."""
        connection = await self.connect()
        await self.read(connection)
        for sample in ({1}, math.nan, math.inf, b"bytes"):
            with self.subTest(sample=sample), self.assertRaises((TypeError, ValueError)):
                self.server.send_message([0, sample])
        self.server.send_message([7])
        self.assertEqual(await self.read(connection), (0, [7]))

    @gen_test
    async def test_a_message_is_never_larger_than_the_history(self) -> None:
        """A batch larger than the history: its newest samples come, and offset has jumped."""
        connection = await self.connect()
        await self.read(connection)
        self.server.send_message(list(range(250)))
        self.assertEqual(await self.read(connection), (150, list(range(150, 250))))

    def test_history_is_bounded(self) -> None:
        """The history holds the newest history_size samples, however many there were."""
        for sample in range(1_000):
            self.server.send_message([sample])
        self.assertEqual(self.server.history, list(range(900, 1_000)))
        self.assertEqual(self.server.end, 1_000)

    @gen_test
    async def test_no_samples_make_no_message(self) -> None:
        """An empty batch sends nothing."""
        connection = await self.connect()
        await self.read(connection)
        await until(lambda: not next(iter(self.server.clients)).writing)
        for samples in ([], [7]):
            self.server.send_message(samples)
        self.assertEqual(await self.read(connection), (0, [7]))

    @gen_test
    async def test_offsets_never_go_back(self) -> None:
        """Within a connection each message starts where the one before it ended."""
        self.server.history_size = 1_000  # more than all
        connection = await self.connect()
        end = 0
        for size in (1, 0, 7, 50, 0, 100, 3):
            self.server.send_message([size] * size)
            await asyncio.sleep(0)
        while end < self.server.end:
            offset, samples = await self.read(connection)
            self.assertEqual(offset, end)
            end += len(samples)


class SlowClientTests(ServerCase):
    attributes = {"history_size": 100}  # noqa: RUF012
    sample = "x" * 20_000  # so that the buffers of a socket are full soon

    async def stuck(self) -> WebSocketServer:
        """Send until the only client has an unfinished write, and return its handler."""
        await until(lambda: self.server.clients)
        (handler,) = self.server.clients
        written = 0
        while written < 3:  # Tornado's own Task needs a turn of the event loop to finish
            self.server.send_message([self.sample])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            stuck = handler.writing and handler.position < self.server.end
            written = written + 1 if stuck else 0
        return handler

    async def frames(self, slow: socket.socket) -> list[tuple[int, list[Any]]]:
        """Read what has come for the slow client so far, and all that comes until the end."""
        data, found, end = b"", [], -1
        slow.setblocking(False)
        while end < self.server.end:
            chunk = await asyncio.get_running_loop().sock_recv(slow, 65_536)
            self.assertTrue(chunk)
            data += chunk
            if b"\r\n\r\n" in data:
                data = data.split(b"\r\n\r\n", 1)[1]
            while len(data) >= 2:
                size, start = data[1], 2
                if size == 126:
                    size, start = int.from_bytes(data[2:4], "big"), 4
                elif size == 127:
                    size, start = int.from_bytes(data[2:10], "big"), 10
                if len(data) < start + size:
                    break
                opcode, payload = data[0] & 0x0F, data[start : start + size]
                data = data[start + size :]
                if opcode != 1:  # a ping
                    continue
                message = json.loads(payload)
                found.append((message["offset"], message["samples"]))
                end = message["offset"] + len(message["samples"])
        return found

    @gen_test
    async def test_slow_reader_gets_fewer_larger_messages(self) -> None:
        """A slow reader inside the history gets every sample, in fewer messages than were sent."""
        slow = self.peer(receive_buffer=4_096)
        await self.stuck()
        for _ in range(50):
            self.server.send_message([self.sample])
        position, messages = 0, 0
        for offset, samples in await self.frames(slow):
            self.assertEqual(offset, position)
            position += len(samples)
            messages += 1
        self.assertEqual(position, self.server.end)
        self.assertLess(messages, self.server.end - 40)

    @gen_test
    async def test_slow_reader_beyond_the_history_sees_a_jump(self) -> None:
        """A slow reader that fell out of the history gets a message whose offset has jumped."""
        slow = self.peer(receive_buffer=4_096)
        await self.stuck()
        for _ in range(200):
            self.server.send_message([self.sample])
        messages = await self.frames(slow)
        offset, samples = messages[-1]
        self.assertEqual((offset, len(samples)), (self.server.end - 100, 100))
        before, earlier = messages[-2]
        self.assertLess(before + len(earlier), offset)

    @gen_test
    async def test_slow_reader_has_at_most_one_unfinished_write(self) -> None:
        """While a write is unfinished, nothing more is handed to Tornado for that client."""
        self.peer(receive_buffer=4_096)
        handler = await self.stuck()
        position = handler.position
        with mock.patch.object(handler, "write_message", side_effect=AssertionError) as written:
            for _ in range(100):
                self.server.send_message([self.sample])
                await asyncio.sleep(0)
        written.assert_not_called()
        self.assertTrue(handler.writing)
        self.assertEqual(handler.position, position)

    @gen_test
    async def test_slow_reader_costs_the_others_nothing(self) -> None:
        """Beside a client that does not read, a healthy one gets each sample in its own message."""
        self.peer(receive_buffer=4_096)
        await self.stuck()
        healthy = await self.connect(f"?epoch={self.server.epoch}&offset={self.server.end}")
        await self.read(healthy)
        for _ in range(200):
            offset = self.server.end
            self.server.send_message([self.sample])
            self.assertEqual(await self.read(healthy), (offset, [self.sample]))


class BadClientTests(ServerCase):
    @gen_test
    async def test_a_client_that_speaks_is_closed_with_1008(self) -> None:
        """Text, binary or empty: the connection is closed with 1008, since it is read-only."""
        for message, binary in (("hello", False), (b"\x00", True), ("", False)):
            connection = await self.connect()
            await connection.write_message(message, binary=binary)
            while await connection.read_message() is not None:
                pass
            self.assertEqual(connection.close_code, 1008)
            self.assertEqual(connection.close_reason, "this stream is read-only")

    @gen_test
    async def test_a_message_over_the_limit_is_closed_with_1009(self) -> None:
        """More than 1 KiB towards the server: 1009."""
        connection = await self.connect()
        await connection.write_message("x" * 1_025)
        while await connection.read_message() is not None:
            pass
        self.assertEqual(connection.close_code, 1009)

    @gen_test
    async def test_a_closing_client_costs_the_others_nothing(self) -> None:
        """While one client is being closed, the others get every sample, and nothing is logged."""
        connections = [await self.connect() for _ in range(5)]
        for connection in connections:
            await self.read(connection)
        for count, handler in enumerate(list(self.server.clients)):
            if count % 2:
                handler.close()  # still registered until its peer has answered
        self.assertEqual(len(self.server.clients), 5)
        with self.assertNoLogs(level="ERROR"):
            self.server.send_message([1])
        with mock.patch.object(self.server, "write_message") as write:
            self.server.send_message([1])
        write.assert_not_called()  # three are being written to, and two are not asked again
        self.assertEqual(len(self.server.clients), 5)  # but counts until its socket is closed
        got = [await connection.read_message() for connection in connections]
        self.assertEqual(sum(message is not None for message in got), 3)

    @gen_test
    async def test_a_write_that_raises_drops_that_client_only(self) -> None:
        """Whatever one client's write raises, it is dropped with one line; the others go on."""
        connections = [await self.connect() for _ in range(3)]
        for connection in connections:
            await self.read(connection)
        bad = next(iter(self.server.clients))
        with (
            mock.patch.object(bad, "write_message", side_effect=RuntimeError("broken")),
            self.assertLogs("server", "ERROR") as logs,
        ):
            self.server.send_message([1])
        self.assertEqual(len(logs.output), 1)
        self.assertIn("dropped: RuntimeError('broken')", logs.output[0])
        self.assertEqual(len(self.server.clients), 3)  # it counts until its socket is closed
        self.server.send_message([1])
        got = [await connection.read_message() for connection in connections]
        self.assertEqual(sum(message is not None for message in got), 2)
        await until(lambda: len(self.server.clients) == 2)

    @gen_test
    async def test_reset_clients_are_forgotten_quietly(self) -> None:
        """Connections that are reset, with writes unfinished, leave no client and no log."""
        with self.assertNoLogs(level="ERROR"):
            for _ in range(5):
                peer = self.peer()
                await until(lambda: self.server.clients)
                self.server.send_message(["x" * 5_000_000])
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                peer.close()
                self.server.send_message(["x"])
                await until(lambda: not self.server.clients)


class MakeAppTests(unittest.TestCase):
    def test_pings_and_limits(self) -> None:
        """Pings go out every 10 s with a timeout of 10 s, and 1 KiB bounds what comes in."""
        settings = make_app().settings
        self.assertEqual(settings["websocket_ping_interval"], 10)
        self.assertEqual(settings["websocket_ping_timeout"], 10)
        self.assertEqual(settings["websocket_max_message_size"], 1_024)

    def test_defaults(self) -> None:
        """The history holds 10,000 samples, and 1,000 clients may come."""
        self.assertEqual(WebSocketServer.history_size, 10_000)
        self.assertEqual(WebSocketServer.max_clients, 1_000)
        self.assertRegex(WebSocketServer.epoch, "^[0-9a-f]{8}$")
        self.assertTrue(issubclass(WebSocketServer, WebSocketHandler))

    def test_each_run_has_an_epoch_of_its_own(self) -> None:
        """Two servers have two epochs."""
        self.assertNotEqual(fresh_server().epoch, fresh_server().epoch)


if __name__ == "__main__":
    unittest.main()
