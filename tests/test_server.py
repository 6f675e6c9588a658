"""The server's side of the protocol, as far as only a network shows it, and `serve`.

What a stream keeps and gives is left to test_stream.py, hostile requests to test_faults.py.
"""

import asyncio
import importlib.util
import socket
import ssl
import time
import unittest
from contextlib import AbstractContextManager
from typing import Any, ClassVar
from unittest import mock

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.iostream import IOStream
from tornado.testing import AsyncHTTPSTestCase
from tornado.websocket import WebSocketClientConnection, websocket_connect

from client import parse
from server import WebSocketServer, make_app, serve
from tests.faults import CLOSE, TEXT, frame, raw_client, reset
from tests.support import HANDSHAKE, Recorder, ServedCase, following, new_handler, serving, until


async def read(connection: WebSocketClientConnection) -> tuple[int, list[Any]]:
    """Read one message, and return its offset and samples."""
    text = await connection.read_message()
    assert text is not None, (connection.close_code, connection.close_reason)
    return parse(text)[1:]


async def end_of(connection: WebSocketClientConnection) -> tuple[int | None, str | None]:
    """Read to the end of a connection, and return close code and reason."""
    while await connection.read_message() is not None:
        pass
    return connection.close_code, connection.close_reason


async def read_frame(peer: IOStream) -> tuple[int, bytes]:
    """Read one frame that the server has sent, and return its opcode and its payload."""
    head, size = await peer.read_bytes(2)
    if size > 125:
        size = int.from_bytes(await peer.read_bytes(2 if size == 126 else 8), "big")
    return head & 15, await peer.read_bytes(size)


class ServerCase(ServedCase):
    """A stream that is served, and its clients."""

    async def asyncSetUp(self) -> None:
        # As `run` does it: from Python 3.12 on, a task begins at once.
        loop = asyncio.get_running_loop()
        loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))
        await super().asyncSetUp()

    async def connect(self, query: str = "", **options: Any) -> WebSocketClientConnection:
        connection = await websocket_connect(HTTPRequest(self.url + query, **options))
        self.addCleanup(connection.close)
        return connection

    async def ready(self) -> WebSocketClientConnection:
        """Connect a client, which gets its first message at once, though there are no samples."""
        connection = await self.connect()
        self.assertEqual(await read(connection), (0, []))
        return connection

    async def peer(self) -> IOStream:
        """Connect a client that reads only what the test reads, and answers nothing."""
        peer = await self.enterAsyncContext(raw_client(self.url, HANDSHAKE))
        await peer.read_until(b"\r\n\r\n")
        return peer

    async def stuck(self) -> IOStream:
        """Connect a client that does not read, and send it more than a connection can hold."""
        peer = await self.peer()
        self.handler.send_message(["x" * 9_900_000])
        await until(lambda: {client.position for client in self.handler.clients} == {1})
        return peer

    def hurry(self) -> AbstractContextManager[Any]:
        """Let the clock of the event loop run a hundred times as fast."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        return mock.patch.object(loop, "time", lambda: begin + 100 * (time.monotonic() - begin))


class ConnectingTests(ServerCase):
    sizes: ClassVar[dict[str, int]] = {"history_size": 10}

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.handler.send_message([*range(15)])
        self.known = f"?epoch={self.stream.epoch}"

    async def starts_at(self, offset: int, query: str) -> None:
        """The first message must begin here."""
        with self.subTest(query=query[:40]):
            self.assertEqual(await read(await self.connect(query)), (offset, [*range(offset, 15)]))

    async def refused(self, code: int, query: str = "", **options: Any) -> str:
        """Return the reason why a connection is refused with this code."""
        with self.assertRaisesRegex(HTTPClientError, f"HTTP {code}: ") as caught:
            await self.connect(query, **options)
        return str(caught.exception).partition(": ")[2]

    async def test_without_this_epoch(self) -> None:
        """Without an epoch, or with another, a client starts at the oldest sample."""
        for query in ("", "?", "?offset=12", "?offset=abc"):
            await self.starts_at(5, query)
        for epoch in ("00000000", "x" * 5_000, "", "%00", "%D9%A1", self.stream.epoch + "0"):
            await self.starts_at(5, f"?epoch={epoch}&offset=12")

    async def test_with_this_epoch(self) -> None:
        """With this epoch, a client starts at its offset, or at the oldest sample after it."""
        for offset in range(16):
            await self.starts_at(max(5, offset), f"{self.known}&offset={offset}")
        await self.starts_at(12, f"{self.known}&offset=000000000000012")

    async def test_with_an_offset_that_no_client_can_have(self) -> None:
        """This epoch, and no number from 0 to the end in 1 to 15 digits: 400 with the reason."""
        odd = ["", "-1", "abc", "1_0", "+1", "1.0", "1e1", "%201", "1%20", "1%0A", "%D9%A1", "%00"]
        odd += ["16", "9" * 15, "1" * 16, "0" * 15 + "1", "1" * 5_000, "%C2%B2"]
        for query in ("", *(f"&offset={offset}" for offset in odd)):
            with self.subTest(query=query[:30]):
                self.assertIn("offset", await self.refused(400, self.known + query))

    async def test_with_an_origin(self) -> None:
        """A page of another site gets 403, and one of the server's own is let in."""
        await self.refused(403, headers={"Origin": "http://evil.example"})
        await self.connect(headers={"Origin": f"http://127.0.0.1:{self.port}"})

    async def test_elsewhere(self) -> None:
        """There is one route, without a slash at its end; anything else gets 404."""
        for path in ("/", "/x", "s"):
            await self.refused(404, path)

    async def test_too_many_clients(self) -> None:
        """One more than max_clients gets 503 with the reason, until another has left."""
        self.handler.max_clients = 1
        first = await self.connect()
        self.assertIn("clients", await self.refused(503))
        first.close()
        await until(lambda: not self.handler.clients)
        await self.connect()

    async def test_a_hundred_at_once_where_5_are_allowed(self) -> None:
        """Exactly 5 get in."""
        self.handler.max_clients = 5
        tries = await asyncio.gather(*(self.connect() for _ in range(100)), return_exceptions=True)
        self.assertEqual(sum(isinstance(result, HTTPClientError) for result in tries), 95)
        self.assertEqual(len(self.handler.clients), 5)


class MessageTests(ServerCase):
    async def test_every_client_gets_every_sample_once(self) -> None:
        """Each sample comes at once to each client."""
        connections = [await self.ready() for _ in range(5)]
        for number in range(20):
            self.handler.send_message([number])
            for connection in connections:
                self.assertEqual(await read(connection), (number, [number]))

    async def test_long_samples(self) -> None:
        """A late joiner gets samples of 12 kB, 100 kB and 1 MB in messages that it can take."""
        samples = [str(number).zfill(12_000) for number in range(1_000)]
        samples += [str(number).zfill(100_000) for number in range(120)]
        samples += [str(number).zfill(1_000_000) for number in range(12)]
        self.handler.send_message(samples)
        with self.assertNoLogs("client", "WARNING"):
            async with following(client := Recorder(self.url)):
                await until(lambda: client.position == len(samples))
        self.assertTrue(client.samples == samples)  # to show the difference would take minutes

    async def test_from_threads(self) -> None:
        """What threads send while clients come and go arrives once, in each thread's order."""
        self.stream.history_size = 15_000

        def source(name: str) -> None:
            for number in range(5_000):
                self.handler.send_message([[name, number]])

        async def program(name: str) -> None:
            source(name)

        async with following(early := Recorder(self.url)):
            threads = [asyncio.to_thread(source, "a"), asyncio.to_thread(source, "b")]
            sources = asyncio.gather(*threads, asyncio.to_thread(asyncio.run, program("c")))
            while not sources.done():
                async with following(visitor := Recorder(self.url)):
                    await until(lambda: visitor.connected)
            await sources
            async with following(late := Recorder(self.url)):
                await until(lambda: early.position == late.position == 15_000)
        self.assertEqual(early.samples, late.samples)
        for name in "abc":
            numbers = [number for thread, number in early.samples if thread == name]
            self.assertEqual(numbers, [*range(5_000)])


class SlowReaderTests(ServerCase):
    async def overtaken(self) -> tuple[int, list[Any]]:
        """Send 49 samples past a peer that does not read; return its next message, parsed."""
        slow = await self.stuck()
        healthy = await self.connect(f"?epoch={self.stream.epoch}&offset=1")
        self.assertEqual(await read(healthy), (1, []))
        for number in range(1, 50):
            self.handler.send_message([number])
            self.assertEqual(await read(healthy), (number, [number]))
        self.assertEqual(sorted(client.position for client in self.handler.clients), [1, 50])
        frames = [await read_frame(slow) for _ in range(3)]  # empty, the long sample, and the rest
        return parse(frames[2][1].decode())[1:]

    async def test_gets_one_long_message(self) -> None:
        """It has all that came meanwhile; the others have got each sample at once."""
        self.assertEqual(await self.overtaken(), (1, [*range(1, 50)]))

    async def test_sees_what_it_has_missed(self) -> None:
        """When it fell out of the history, the offset jumps to the oldest sample."""
        self.stream.history_size = 10
        self.assertEqual(await self.overtaken(), (40, [*range(40, 50)]))

    async def test_is_reset(self) -> None:
        """A client whose connection is reset during a write is forgotten without a warning."""
        with self.assertNoLogs("server", "WARNING"):
            peer = await self.stuck()
            reset(peer)
            await until(lambda: not self.handler.clients)


class BadClientTests(ServerCase):
    async def test_that_speaks(self) -> None:
        """It is closed: with 1008, since the stream is read-only; above 1,024 bytes with 1009."""
        for message in ("hello", b"\x00", "", "x" * 1_024, "x" * 1_025):
            connection = await self.ready()
            await connection.write_message(message, binary=isinstance(message, bytes))
            code, _ = await end_of(connection)
            self.assertEqual(code, 1009 if len(message) > 1_024 else 1008)

    async def test_that_does_not_answer_when_it_is_closed(self) -> None:
        """It gets nothing more, but counts until its connection has ended."""
        peer = await self.peer()
        await read_frame(peer)
        await peer.write(frame(TEXT, b"hello"))
        opcode, _ = await read_frame(peer)
        self.assertEqual(opcode, CLOSE)
        self.handler.send_message([1])
        self.assertEqual(await read(await self.connect()), (0, [1]))
        self.assertEqual(len(self.handler.clients), 2)
        with self.hurry():
            await until(lambda: len(self.handler.clients) == 1)
        self.assertEqual(await peer.read_until_close(), b"")

    async def test_to_which_a_write_raises(self) -> None:
        """It is closed with 1011, the log has the traceback, and the others notice nothing."""
        connections = [await self.ready() for _ in range(5)]
        bad = next(iter(self.handler.clients))
        broken = mock.patch.object(bad, "write_message", side_effect=ValueError("broken"))
        with broken, self.assertLogs("server", "ERROR") as logs:
            self.handler.send_message([0])
            await until(lambda: len(self.handler.clients) == 4)
        self.assertIn("ValueError: broken", "".join(logs.output))
        self.handler.send_message([1])
        codes = []
        for connection in connections:
            if await connection.read_message() is None:
                codes.append(connection.close_code)
            else:
                self.assertEqual(await read(connection), (1, [1]))
        self.assertEqual(codes, [1011])


class SubclassTests(ServerCase):
    async def test_that_calls_super(self) -> None:
        """A client that leaves while `prepare` awaits something is forgotten; the next is served."""
        asked, answer, left = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Asking(WebSocketServer):
            async def prepare(self) -> None:  # type: ignore[override]
                super().prepare()
                asked.set()
                await answer.wait()

            def on_close(self) -> None:
                super().on_close()
                left.set()

        self.handler = Asking
        await self.restart()
        async with raw_client(self.url, HANDSHAKE):
            await asked.wait()
        await left.wait()
        answer.set()
        await self.ready()
        self.assertEqual(len(Asking.clients), 1)

    async def test_that_forgets_super(self) -> None:
        """Without it in `prepare`, the client is closed with 1011; the log has the traceback."""

        class Forgetful(WebSocketServer):
            def prepare(self) -> None:
                pass

        self.handler = Forgetful
        await self.restart()
        with self.assertLogs("server", "ERROR") as logs:
            self.assertEqual((await end_of(await self.connect()))[0], 1011)
        self.assertIn("Traceback", logs.output[0])

    async def test_that_raises_in_open(self) -> None:
        """Its client is forgotten when there is a sample to send; Tornado never calls on_close."""

        class Raising(WebSocketServer):
            def open(self) -> None:
                super().open()
                raise ValueError("broken")

        self.handler = Raising
        await self.restart()
        with self.assertLogs("tornado.application", "ERROR"):
            await end_of(await self.connect())
        self.handler.send_message([1])
        with self.hurry():
            await until(lambda: not self.handler.clients)


class MakeAppTests(ServerCase):
    async def test_refuses_a_class_that_has_clients(self) -> None:
        """RuntimeError, and the clients go on; they do not matter to a parent or a subclass."""
        self.handler = new_handler(parent := new_handler())
        await self.restart()
        connection = await self.ready()
        with self.assertRaisesRegex(RuntimeError, self.handler.__name__):
            make_app(self.handler)
        for other in (parent, new_handler(self.handler)):
            make_app(other)
        self.handler.send_message([1])
        self.assertEqual(await read(connection), (0, [1]))

    async def test_sending_without_it(self) -> None:
        """On a class that is not served, even if its parent is, it is a RuntimeError."""
        for unserved in (new_handler(), new_handler(self.handler)):
            with self.assertRaisesRegex(RuntimeError, "make_app"):
                unserved.send_message([1])
        await self.ready()  # there is nothing in the stream of the parent

    async def test_settings(self) -> None:
        """A ping every 10 s, 1,024 bytes at most from a client, and room for 900 clients."""
        settings = make_app(self.handler).settings
        self.assertEqual(settings["websocket_ping_interval"], 10)
        self.assertEqual(settings["websocket_max_message_size"], 1_024)
        self.assertEqual(self.handler.max_clients, 900)


class TwoApplicationsTests(ServerCase):
    async def test_at_the_same_time(self) -> None:
        """Each has its own samples and clients; when one ends, the other's notice nothing."""
        staying = await self.ready()
        other = new_handler(self.handler)
        async with serving(make_app(other)) as self.url:
            leaving = await self.ready()
            other.send_message(["other"])
            self.assertEqual(await read(leaving), (0, ["other"]))
        self.assertEqual(await end_of(leaving), (1001, "going away"))
        self.handler.send_message([1])
        self.assertEqual(await read(staying), (0, [1]))

    def test_one_after_the_other(self) -> None:
        """A class may be served again, even in another event loop, and has a new stream then."""
        handler = new_handler()

        async def program() -> str:
            async with serving(make_app(handler)) as url, following(client := Recorder(url)):
                handler.send_message([1])
                await until(lambda: client.samples == [1])
            return handler.stream.epoch

        self.assertNotEqual(asyncio.run(program()), asyncio.run(program()))


class GoodbyeTests(ServerCase):
    async def test_to_every_client(self) -> None:
        """Each gets 1001, once; one that does not answer is dropped, so that the server ends."""
        silent = await self.stuck()
        healthy = await self.connect()
        ended = asyncio.create_task(self.served.aclose())
        self.assertEqual(await end_of(healthy), (1001, "going away"))
        frames = [await read_frame(silent) for _ in range(3)]  # empty, the long sample, and this
        self.assertEqual(frames[2], (CLOSE, (1001).to_bytes(2) + b"going away"))
        with self.hurry():
            await until(ended.done)
        self.assertEqual(self.handler.clients, set())
        self.assertEqual(await silent.read_until_close(), b"")

    async def test_to_who_is_no_client_yet(self) -> None:
        """A connection is closed, whatever it has sent so far, and nobody can connect any more."""
        connections = [raw_client(self.url, sent) for sent in (b"", b"GET /", HANDSHAKE[:-2])]
        peers = [await self.enterAsyncContext(connection) for connection in connections]
        await self.ready()  # by then, the server has accepted those before it
        await self.served.aclose()
        with self.assertRaises(OSError):
            await self.connect()
        self.assertEqual([peer.closed() for peer in peers], [True, True, True])


class ServeTests(ServerCase):
    async def test_on_a_port_that_is_taken(self) -> None:
        """An OSError names address and port, and the other server goes on."""
        connection = await self.ready()
        with self.assertRaisesRegex(OSError, f"127.0.0.1:{self.port}"):
            await serve(make_app(new_handler()), self.port, "127.0.0.1")
        self.handler.send_message([1])
        self.assertEqual(await read(connection), (0, [1]))

    async def test_on_an_address_that_is_not_here(self) -> None:
        """Unknown, malformed, or of another machine: an OSError names address and port."""
        for host in ("no-such-host.invalid", "x" * 300, "192.0.2.1", "[2001:db8::1]"):
            with self.subTest(host), self.assertRaises(OSError) as caught:
                await serve(make_app(new_handler()), self.port, host.strip("[]"))
            self.assertIn(f"{host}:{self.port}", str(caught.exception))

    async def test_on_what_cannot_be_meant(self) -> None:
        """An empty address, or a port out of range, is a ValueError that names it."""
        for port, address in ((0, ""), (-1, "localhost"), (65_536, "localhost")):
            with self.assertRaisesRegex(ValueError, f"{address!r}, {port}"):
                await serve(make_app(new_handler()), port, address)

    @unittest.skipUnless(socket.has_dualstack_ipv6(), "there is no IPv6")
    async def test_on_ipv6(self) -> None:
        """The URL has the address in brackets, and leads to the server."""
        async with serving(make_app(new_handler()), address="::1") as self.url:
            self.assertRegex(self.url, r"\Aws://\[::1\]:\d+/websocket\Z")
            await self.ready()


class TlsClient(Recorder):
    """A client that trusts the authorities in a file, or those of the system; or anyone."""

    ca_certs: str | None = None
    validate_cert = True

    def request(self, url: str) -> HTTPRequest:
        return HTTPRequest(url, ca_certs=self.ca_certs, validate_cert=self.validate_cert)


class WssTests(ServedCase):
    """A stream behind TLS, whose certificate is one of Tornado's own tests at first."""

    async def asyncSetUp(self) -> None:
        self.handler = new_handler()
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(**AsyncHTTPSTestCase.default_ssl_options())
        self.url = await self.enterAsyncContext(serving(make_app(self.handler), ssl=self.context))
        self.client = TlsClient(self.url)
        self.handler.send_message([*range(10)])

    async def cannot_connect(self, reason: str) -> None:
        """Each try of the client must be one line that has this reason."""
        with self.assertLogs("client", "WARNING") as logs:
            async with following(self.client):
                await until(lambda: len(logs.output) > 2)
        for line in logs.output:
            self.assertRegex(line, rf"\AWARNING:client:cannot connect: .*{reason}.*\Z")

    async def test_url(self) -> None:
        """With an SSLContext, the URL begins with wss; with ws, a client is not let in."""
        self.assertRegex(self.url, r"\Awss://127\.0\.0\.1:\d+/websocket\Z")
        self.client.url = self.url.replace("wss", "ws")
        await self.cannot_connect("")

    async def test_certificate_that_is_not_trusted(self) -> None:
        """Each try is one line; a client that does not ask for trust gets all samples."""
        await self.cannot_connect("certificate verify failed: self.signed")
        self.client.validate_cert = False
        async with following(self.client):
            await until(lambda: self.client.samples == [*range(10)])

    @unittest.skipUnless(importlib.util.find_spec("trustme"), "needs trustme")
    async def test_certificate_of_another_host(self) -> None:
        """Each try is one line; when the server has the right one, its clients get all samples."""
        import trustme

        authority = trustme.CA()
        with authority.cert_pem.tempfile() as self.client.ca_certs:
            authority.issue_cert("other.example").configure_cert(self.context)
            await self.cannot_connect("certificate is not valid for '127.0.0.1'")
            authority.issue_cert("127.0.0.1").configure_cert(self.context)
            async with following(self.client):
                await until(lambda: self.client.samples == [*range(10)])
