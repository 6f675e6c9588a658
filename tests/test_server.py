"""What only a network shows of the server: positions, slow and closing clients, `serve`.

The log itself is left to test_stream.py, what hostile clients send to test_faults_hostile.py, and
many clients, slow links and restarts to the other tests of faults.
"""

import asyncio
import inspect
import socket
import ssl
import time
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.iostream import IOStream
from tornado.testing import AsyncHTTPSTestCase
from tornado.websocket import WebSocketClientConnection, websocket_connect

from client import parse
from server import WebSocketServer, make_app, serve
from tests.faults import CLOSE, TEXT, frame, raw_client, read_frame, request
from tests.support import PATIENCE, Recorder, ServedCase, following, new_handler, serving, until


async def read(connection: WebSocketClientConnection) -> tuple[int, list[Any]]:
    """Read one message, and return its offset and samples."""
    text = await asyncio.wait_for(connection.read_message(), PATIENCE)
    assert text is not None, (connection.close_code, connection.close_reason)
    return parse(text)[1:]


async def end_of(connection: WebSocketClientConnection) -> tuple[int | None, str | None]:
    """Read to the end of a connection, and return close code and reason."""
    async with asyncio.timeout(PATIENCE):
        while await connection.read_message() is not None:
            pass
    return connection.close_code, connection.close_reason


def tls_context() -> ssl.SSLContext:
    """Return what a server needs to speak TLS, with a certificate that nobody trusts."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(**AsyncHTTPSTestCase.default_ssl_options())
    return context


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
        peer = await self.enterAsyncContext(raw_client(self.url, request()))
        await peer.read_until(b"\r\n\r\n")
        return peer

    async def stuck(self) -> IOStream:
        """Connect a client that does not read, and send it more than a connection can hold."""
        peer = await self.peer()
        self.handler.send_message(["x" * 9_900_000])
        # The long sample has been read from the stream, and is being written.
        await until(lambda: {client.position for client in self.handler.clients} == {1})
        return peer

    def fast_clock(self) -> AbstractContextManager[Any]:
        """Let timers come a hundred times as early; `until` wakes the event loop to see them."""
        loop = asyncio.get_running_loop()
        begin = loop.time()
        return mock.patch.object(loop, "time", lambda: begin + 100 * (time.monotonic() - begin))


class ConnectingTests(ServerCase):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.stream.history_size = 10
        self.handler.send_message([*range(15)])
        self.known = f"?epoch={self.stream.epoch}"

    async def assert_starts_at(self, offset: int, *queries: str) -> None:
        """The first message must begin here, and hold all up to the end."""
        for query in queries:
            with self.subTest(query=query[:40]):
                first = await read(await self.connect(query))
                self.assertEqual(first, (offset, [*range(offset, 15)]))

    async def assert_refused(self, code: int, query: str = "", **options: Any) -> str:
        """Return the reason why a connection is refused with this code."""
        with self.assertRaisesRegex(HTTPClientError, f"HTTP {code}: ") as caught:
            await self.connect(query, **options)
        return caught.exception.message

    async def test_without_this_epoch(self) -> None:
        """Without an epoch, or with another, a client starts at the oldest sample."""
        await self.assert_starts_at(5, "", "?", "?offset=12", "?offset=abc")
        others = ("00000000", "x" * 5_000, "", "%00", "%D9%A1", self.stream.epoch + "0")
        await self.assert_starts_at(5, *(f"?epoch={other}&offset=12" for other in others))

    async def test_with_this_epoch(self) -> None:
        """With this epoch, a client starts at its offset, or at the oldest sample after it."""
        for offset in (0, 4, 5, 6, 14, 15):
            await self.assert_starts_at(max(5, offset), f"{self.known}&offset={offset}")
        await self.assert_starts_at(12, f"{self.known}&offset=000000000000012")

    async def test_with_an_impossible_offset(self) -> None:
        """With this epoch, an offset past the end, or not 1 to 15 digits, gets 400 and the reason."""
        odd = ["", "-1", "abc", "1_0", "+1", "1.0", "1e1", "%201", "1%20", "1%0A", "%00"]
        odd += ["%D9%A1", "%C2%B2"]  # an Arabic 1, a superscript 2
        odd += ["16", "9" * 15, "1" * 16, "0" * 15 + "1", "1" * 5_000]
        for query in ("", *(f"&offset={offset}" for offset in odd)):
            with self.subTest(query=query[:30]):
                self.assertIn("offset", await self.assert_refused(400, self.known + query))

    async def test_with_an_origin(self) -> None:
        """A page of another site gets 403, and one of the server's own is let in."""
        await self.assert_refused(403, headers={"Origin": "http://evil.example"})
        await self.connect(headers={"Origin": f"http://127.0.0.1:{self.port}"})

    async def test_elsewhere(self) -> None:
        """There is one route, without a slash at its end; anything else gets 404."""
        for path in ("/", "/x", "s"):  # each comes after /websocket
            await self.assert_refused(404, path)

    async def test_too_many_clients(self) -> None:
        """Of 100 at once, max_clients get in; one more gets 503, until another has left."""
        self.handler.max_clients = 5
        tries = await asyncio.gather(*(self.connect() for _ in range(100)), return_exceptions=True)
        admitted = [one for one in tries if isinstance(one, WebSocketClientConnection)]
        codes = [one.code for one in tries if isinstance(one, HTTPClientError)]
        self.assertEqual((len(admitted), codes), (5, 95 * [503]))
        self.assertIn("clients", await self.assert_refused(503))
        admitted[0].close()
        await until(lambda: len(self.handler.clients) == 4)
        await self.connect()


class SendingTests(ServerCase):
    async def test_long_samples(self) -> None:
        """A late joiner gets samples of 12 kB, 100 kB and 10 MB in messages that it can take."""
        samples = ["x" * 12_000] * 1_000 + ["y" * 100_000] * 120
        samples += ["z" * 9_999_998]  # with its quotes, the longest that append takes
        self.handler.send_message(samples)
        async with following(client := Recorder(self.url)):
            await until(lambda: client.position == len(samples))
        self.assertTrue(client.samples == samples)  # to show the difference would take minutes

    async def test_from_threads(self) -> None:
        """What threads send while clients come and go arrives once, in each thread's order."""
        self.stream.history_size = 15_000

        def source(name: str) -> None:
            for number in range(5_000):
                self.handler.send_message([[name, number]])

        async with following(client := Recorder(self.url)):
            threads = asyncio.gather(*(asyncio.to_thread(source, name) for name in "abc"))
            while not threads.done():
                async with following(visitor := Recorder(self.url)):
                    await until(lambda: visitor.connected)
            await threads
            await until(lambda: client.position == 15_000)
        for name in "abc":
            numbers = [number for thread, number in client.samples if thread == name]
            self.assertEqual(numbers, [*range(5_000)])

    async def test_slow_reader(self) -> None:
        """It gets what the history still has, in one message; another got each sample at once."""
        self.stream.history_size = 10
        slow = await self.stuck()
        other = await self.connect(f"?epoch={self.stream.epoch}&offset=1")
        self.assertEqual(await read(other), (1, []))
        for number in range(1, 50):
            self.handler.send_message([number])
            self.assertEqual(await read(other), (number, [number]))
        # The slow one is still being sent the long sample.
        self.assertEqual(min(client.position for client in self.handler.clients), 1)
        frames = [await read_frame(slow) for _ in range(3)]  # empty, the long sample, and the rest
        self.assertEqual(parse(frames[2][1].decode())[1:], (40, [*range(40, 50)]))


class BadClientTests(ServerCase):
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
        with self.fast_clock():
            await until(lambda: len(self.handler.clients) == 1)
        self.assertEqual(await peer.read_until_close(), b"")

    async def test_to_which_a_write_raises(self) -> None:
        """It is closed with 1011, the log has the traceback, and another notices nothing."""
        bad = await self.ready()
        (client,) = self.handler.clients
        healthy = await self.ready()
        broken = mock.patch.object(client, "write_message", side_effect=ValueError("broken"))
        with broken, self.assertLogs("server", "ERROR") as logs:
            self.handler.send_message([0])
            self.assertEqual((await end_of(bad))[0], 1011)
        self.assertRegex(logs.output[0], "(?s)Traceback .*ValueError: broken")
        self.assertEqual(await read(healthy), (0, [0]))


class SubclassTests(ServerCase):
    async def test_whose_client_leaves_during_prepare(self) -> None:
        """It is forgotten, although `prepare` goes on after that; the next client is served."""
        asking: list[WebSocketServer] = []
        answer = asyncio.Event()

        class Asking(WebSocketServer):
            async def prepare(self) -> None:  # type: ignore[override]
                asking.append(self)
                await answer.wait()
                super().prepare()

        await self.restart(Asking)
        async with raw_client(self.url, request()):
            await until(lambda: asking)
        await until(lambda: asking[0].gone)
        answer.set()  # Tornado calls `open` all the same
        await self.ready()
        self.assertEqual(len(Asking.clients), 1)

    async def test_that_forgets_super(self) -> None:
        """If `prepare` does not call it, the client is closed with 1011, and a traceback says why."""

        class Forgetful(WebSocketServer):
            def prepare(self) -> None:
                pass

        await self.restart(Forgetful)
        with self.assertLogs("server", "ERROR") as logs:
            self.assertEqual((await end_of(await self.connect()))[0], 1011)
        self.assertRegex(logs.output[0], "(?s)Traceback .*AttributeError: .*'position'")

    async def test_that_raises_in_open(self) -> None:
        """Its client, which Tornado just drops, does not hold up the end of the server for ever.

        It is forgotten when there is a sample to send.
        """
        broken = asyncio.Event()

        class Raising(WebSocketServer):
            async def open(self) -> None:  # type: ignore[override]
                super().open()
                await broken.wait()
                raise ValueError("broken")

        await self.restart(Raising)
        connection = await self.ready()
        with self.assertLogs("tornado.application", "ERROR"):
            broken.set()
            await end_of(connection)
        ended = asyncio.create_task(self.served.aclose())
        with self.fast_clock():
            await until(ended.done)
            self.handler.send_message([1])
            await until(lambda: not self.handler.clients)


class MakeAppTests(ServerCase):
    async def test_refuses_a_class_that_has_clients(self) -> None:
        """RuntimeError, and the clients go on; they do not matter to a parent or a subclass."""
        parent = new_handler()
        await self.restart(new_handler(parent))
        connection = await self.ready()
        with self.assertRaisesRegex(RuntimeError, "served already"):
            self.make_app(self.handler)
        self.make_app(parent)
        self.make_app(new_handler(self.handler))
        self.handler.send_message([1])
        self.assertEqual(await read(connection), (0, [1]))

    async def test_sending_without_it(self) -> None:
        """send_message raises RuntimeError on a class that is not served, even if its parent is."""
        for unserved in (new_handler(), new_handler(self.handler)):
            with self.assertRaisesRegex(RuntimeError, "make_app"):
                unserved.send_message([1])
        await self.ready()  # there is nothing in the stream of the parent

    async def test_two_applications(self) -> None:
        """Each has its own samples and clients; when one ends, the other's notice nothing."""
        staying = await self.ready()
        other = new_handler(self.handler)
        async with serving(self.make_app(other)) as self.url:  # where `ready` now connects
            leaving = await self.ready()
            other.send_message(["other"])
            self.assertEqual(await read(leaving), (0, ["other"]))
        self.assertEqual(await end_of(leaving), (1001, "going away"))
        self.handler.send_message([1])
        self.assertEqual(await read(staying), (0, [1]))

    def test_one_application_after_another(self) -> None:
        """A class may be served again, even in another event loop, and has a new stream then."""
        handler = new_handler()

        async def program() -> str:
            async with serving(self.make_app(handler)) as url, following(client := Recorder(url)):
                handler.send_message([1])
                await until(lambda: client.samples == [1])
            return handler.stream.epoch

        self.assertNotEqual(asyncio.run(program()), asyncio.run(program()))

    async def test_ping_interval(self) -> None:
        """A client is pinged every 10 s."""
        self.assertEqual(self.make_app(self.handler).settings["websocket_ping_interval"], 10)


class GoodbyeTests(ServerCase):
    async def test_to_every_client(self) -> None:
        """Each gets 1001, once; one that does not answer is dropped, so that the server ends."""
        silent = await self.peer()
        healthy = await self.ready()
        ended = asyncio.create_task(self.served.aclose())
        self.assertEqual(await end_of(healthy), (1001, "going away"))
        frames = [await read_frame(silent) for _ in range(2)]  # the empty message, and this
        self.assertEqual(frames[1], (CLOSE, (1001).to_bytes(2) + b"going away"))
        with self.fast_clock():
            await until(ended.done)
        self.assertEqual(self.handler.clients, set())
        self.assertEqual(await silent.read_until_close(), b"")

    async def test_to_a_client_that_does_not_read(self) -> None:
        """It is dropped, so that the server ends."""
        await self.stuck()
        ended = asyncio.create_task(self.served.aclose())
        with self.fast_clock():
            await until(ended.done)
        self.assertEqual(self.handler.clients, set())

    async def test_to_those_who_are_not_clients_yet(self) -> None:
        """A connection is closed, whatever it has sent so far, and nobody can connect any more."""
        connections = [raw_client(self.url, sent) for sent in (b"", b"GET /", request()[:-2])]
        peers = [await self.enterAsyncContext(connection) for connection in connections]
        await self.ready()  # by then, the server has accepted those before it
        await self.served.aclose()
        with self.assertRaises(OSError):
            await self.connect()
        self.assertEqual([peer.closed() for peer in peers], [True, True, True])


class ServeTests(ServerCase):
    def test_default(self) -> None:
        """It listens on localhost only, at the port where client.py looks."""
        defaults = [one.default for one in inspect.signature(serve).parameters.values()]
        self.assertEqual(defaults[1:], [8765, "localhost", None])

    async def test_on_a_port_that_is_taken(self) -> None:
        """Or an address that cannot be used: an OSError names host and port; the first one goes on."""
        app = make_app(new_handler())
        for host in ("127.0.0.1", "no-such-host.invalid", "x" * 300, "192.0.2.1"):
            with self.subTest(host), self.assertRaises(OSError) as caught:
                await self.enterAsyncContext(serving(app, self.port, host))
            self.assertIn(f"{host}:{self.port}", str(caught.exception))
        await self.ready()

    async def test_on_what_cannot_be_meant(self) -> None:
        """An empty address, or a port out of range, is a ValueError that names it."""
        app = make_app(new_handler())
        for port, address in ((0, ""), (-1, "localhost"), (65_536, "localhost")):
            with self.assertRaisesRegex(ValueError, f"{address!r}, {port}"):
                await self.enterAsyncContext(serving(app, port, address))
        with self.assertRaises(OSError):  # here, only the host is wrong
            await serve(app, 65_535, "no-such-host.invalid")

    async def test_on_ipv6(self) -> None:
        """The URL has the address in brackets, and leads to the server."""
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("there is no IPv6")
        async with serving(make_app(new_handler()), address="::1") as self.url:
            self.assertRegex(self.url, r"\Aws://\[::1\]:\d+/websocket\Z")
            await self.ready()
        with self.assertRaisesRegex(OSError, rf"\[2001:db8::1\]:{self.port}: "):
            await serve(make_app(self.handler), self.port, "2001:db8::1")

    async def test_with_tls(self) -> None:
        """The URL begins with wss, and leads to the server."""
        async with serving(make_app(self.handler), ssl=tls_context()) as self.url:
            self.assertRegex(self.url, r"\Awss://127\.0\.0\.1:\d+/websocket\Z")
            self.assertEqual(await read(await self.connect(validate_cert=False)), (0, []))
