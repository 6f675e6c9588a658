"""What a network shows of a client: handshakes, ends, silence, a flood; and its waits."""

import asyncio
import contextlib
import logging
import math
import re
import selectors
import socket
import threading
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, ClassVar
from unittest import mock

from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from client import WebSocketClient
from tests.support import QuietCase, Recorder, ServedCase, following, free_port, until
from tests.test_rule import FakeConnection, follow, message


@contextlib.asynccontextmanager
async def serving(handler: type[RequestHandler]) -> AsyncIterator[str]:
    """Serve a handler of Tornado's, and yield the URL."""
    listener, port = bind_unused_port()
    http = HTTPServer(Application([("/", handler)]))
    http.add_socket(listener)
    try:
        yield f"ws://127.0.0.1:{port}/"
    finally:
        http.stop()
        await http.close_all_connections()


def hurried(factor: int) -> asyncio.AbstractEventLoop:
    """Make an event loop whose clock runs so many times as fast, and which waits as much less."""
    selector = selectors.SelectSelector()
    loop = asyncio.SelectorEventLoop(selector)
    select, time = selector.select, loop.time
    selector.select = lambda timeout=None: select(timeout and timeout / factor)  # type: ignore
    loop.time = lambda: factor * time()  # type: ignore[method-assign]
    return loop


class ClientCase(QuietCase):
    async def lines(self, client: WebSocketClient, count: int = 3) -> list[str]:
        """Follow until the client has logged so many lines or tracebacks; return these."""
        with self.assertLogs("client", "WARNING") as logs:
            async with following(client):
                await until(lambda: len(logs.output) >= count)
        return logs.output[:count]


class HandshakeTests(ClientCase):
    async def check_answer(self, answer: bytes, reason: str) -> None:
        """Three tries that are answered so are three requests and three lines with the reason."""
        urls: list[str | None] = []

        class Answering(RequestHandler):
            async def get(self) -> None:
                urls.append(self.request.uri)
                stream = self.detach()
                with contextlib.suppress(StreamClosedError):  # the client has been stopped
                    await stream.write(answer + b"\r\nContent-Length: 0\r\n\r\n")
                    await stream.read_until_close()

        with self.subTest(answer=answer):
            async with serving(Answering) as url:
                lines = await self.lines(Recorder(url))
            for line in lines:
                self.assertRegex(line, f"^.*cannot connect: .*{reason}.*$")
            self.assertIn(urls, (["/"] * 3, ["/"] * 4))

    async def test_refusal(self) -> None:
        """The line has the status and what the server says; no redirect is followed."""
        for status in 301, 302, 303, 307, 308, 400, 403, 404, 500, 503:
            await self.check_answer(b"HTTP/1.1 %d no\r\nLocation: /there" % status, f"{status}.*no")

    async def test_malformed_answer(self) -> None:
        """Whatever is no answer to a handshake is one line a try, too."""
        # Tornado has a traceback for some of them, which `main` mutes, too.
        tornado = logging.getLogger("tornado.application")
        self.enterContext(mock.patch.object(tornado, "disabled", True))
        no_key = b"HTTP/1.1 101 Go on\r\nUpgrade: websocket\r\nConnection: Upgrade"
        wrong_key = no_key + b"\r\nSec-WebSocket-Accept: " + b"x" * 28
        for answer in b"HTTP/1.1 200 OK", b"garbage", b"HTTP/1.1 9", wrong_key, no_key:
            await self.check_answer(answer, "")

    async def test_no_server(self) -> None:
        """A port where nobody listens, and a host that does not exist: one line a try."""
        for host in f"127.0.0.1:{free_port()}", "no-such-host.invalid", f"{'long' * 16}.example":
            with self.subTest(host=host):
                for line in await self.lines(Recorder(f"ws://{host}/")):
                    self.assertRegex(line, "^.*cannot connect: .+$")

    def test_silence(self) -> None:
        """A handshake that nobody answers is given up after 10 s."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = Recorder(f"ws://127.0.0.1:{server.getsockname()[1]}/")
            with asyncio.Runner(loop_factory=partial(hurried, 20)) as runner:
                (line,) = runner.run(self.lines(client, 1))
        self.assertRegex(line, "^.*cannot connect: .+$")
        request = client.request(client.url)
        self.assertEqual((request.connect_timeout, request.request_timeout), (10, 10))

    async def test_bug_in_request(self) -> None:
        """It has its traceback, and is tried again; an OSError is one line."""
        client = Recorder("ws://localhost/")
        with mock.patch.object(client, "request", side_effect=KeyError("STREAM_TOKEN")):
            lines = await self.lines(client, 4)
        self.assertRegex(lines[2], "(?s)Traceback .*KeyError: 'STREAM_TOKEN'$")
        with mock.patch.object(client, "request", side_effect=OSError("no such file")):
            lines = await self.lines(client, 2)
        self.assertRegex(lines[1], "^.*cannot connect: no such file.*$")

    async def test_url(self) -> None:
        """The URL's own query comes first, then epoch and position; no log has the query."""
        asked: list[str | None] = []

        class Once(WebSocketHandler):
            def open(self) -> None:
                asked.append(self.request.uri)
                self.write_message(message(5, [1, 1, 0], "a&b"))
                self.close(1001, "going away")

        with self.assertLogs("client", "INFO") as logs:
            async with serving(Once) as url, following(Recorder(f"{url}?token=s3cret")):
                await until(lambda: len(asked) >= 3)
        self.assertEqual(asked[:2], ["/?token=s3cret", "/?token=s3cret&epoch=a%26b&offset=8"])
        self.assertRegex(logs.output[0], f"connected to {url}$")
        self.assertNotIn("s3cret", "".join(logs.output))

    async def test_stop(self) -> None:
        """A handshake that stop has cut short leaves no connection."""
        asked, go_on = asyncio.Event(), asyncio.Event()
        codes = []

        class Slow(WebSocketHandler):
            async def prepare(self) -> None:
                asked.set()
                await go_on.wait()

            def on_close(self) -> None:
                codes.append(self.close_code)

        async with serving(Slow) as url:
            async with following(Recorder(url)):
                await asked.wait()
            go_on.set()
            await until(lambda: codes)
        self.assertEqual(codes, [1000])

    def test_url_that_can_never_work(self) -> None:
        """It is a ValueError at once, which shows no password."""
        bad = ["http://localhost/", "localhost:8765", "", "ws://", "ws://:80/", "ws:///websocket"]
        bad += ["ws://localhost:99999/", "ws://localhost:0/", "ws://localhost:abc/", "ws://[::1/"]
        bad += ["ws://alice:s3cret@localhost/", "ws://s3cret@localhost/"]
        for url in bad:
            with self.subTest(url=url), self.assertRaises(ValueError) as raised:
                WebSocketClient(url)
            self.assertNotIn("s3cret", str(raised.exception))


class ConnectionTests(ClientCase):
    async def test_message_over_the_limit(self) -> None:
        """It is refused with 1009, and nothing of it is counted."""
        codes = []

        class Huge(WebSocketHandler):
            async def open(self) -> None:
                with contextlib.suppress(WebSocketClosedError):
                    await self.write_message(message(0, ["x" * 11 * 2**20]))

            def on_close(self) -> None:
                codes.append(self.close_code)

        async with serving(Huge) as url:
            client = Recorder(url)
            await self.lines(client, 2)
            await until(lambda: codes)
        self.assertEqual(codes[0], 1009)
        self.assertEqual((client.epoch, client.samples), (None, []))

    def test_silent_server(self) -> None:
        """A ping of the client's notices it within 25 s, and so does stop, after 5 s."""

        class Silent(WebSocketHandler):
            async def open(self) -> None:
                await asyncio.Event().wait()  # neither reads nor writes

        async def check() -> None:
            async with serving(Silent) as url:
                client = Recorder(url)
                await self.lines(client, 1)
                async with following(client):
                    await until(lambda: client.connected)

        with asyncio.Runner(loop_factory=partial(hurried, 20)) as runner:
            runner.run(check())


class FloodTests(ServedCase):
    sizes: ClassVar = {"message_size": 1}

    async def test_flood(self) -> None:
        """What a busy client cannot take, 12 MB, waits at the server, and comes in longer lists."""
        free = threading.Event()
        self.addCleanup(free.set)

        class Busy(Recorder):
            def on_message(self, samples: list[Any]) -> None:
                free.wait()
                super().on_message(samples)

        busy, control = Busy(self.url), Recorder(self.url)
        samples = [f"{number:030000}" for number in range(400)]
        busy.start()
        async with following(control):
            await until(lambda: len(self.handler.clients) == 2)
            for sample in samples:  # more than the buffers of the kernel hold
                self.handler.send_message([sample])
            await until(lambda: len(control.samples) == 400)
            self.assertEqual(sum(one.position < 400 for one in self.handler.clients), 1)
        free.set()
        await until(lambda: len(busy.samples) == 400)
        await asyncio.to_thread(busy.stop)
        self.assertEqual(busy.samples, samples)
        self.assertLess(len(busy.lengths), 400)


class BackoffTests(QuietCase):
    def assert_waits(self, *connections: FakeConnection, limits: list[int], **delay: float) -> None:
        """Assert that the waits after these connections are spread from 0 to these limits."""
        lines = []
        with asyncio.Runner(loop_factory=partial(hurried, 1_000_000)) as runner:
            for _ in range(100):
                client = WebSocketClient("wss://localhost/", **delay)
                with self.assertLogs("client", "WARNING") as logs:
                    runner.run(follow(client, *connections))
                lines.append(re.findall(r"next try in ([\d.]+) s", "\n".join(logs.output)))
        for waits, limit in zip(zip(*lines, strict=True), limits, strict=True):
            shortest, *_, longest = sorted(map(float, waits))
            self.assertLess(shortest, 0.2 * limit)
            self.assertTrue(0.8 * limit < longest <= limit, f"{longest} of {limit}")

    def test_limit_is_doubled(self) -> None:
        """Each failure doubles the limit, up to 30 s."""
        self.assert_waits(*[FakeConnection()] * 6, limits=[3, 6, 12, 24, 30, 30])

    def test_limit_returns(self) -> None:
        """It returns when the position has moved, and when the epoch is a new one."""
        nothing, sample = FakeConnection(), FakeConnection(message(0, [0]))
        self.assert_waits(nothing, nothing, sample, nothing, limits=[3, 6, 3, 6])
        old, new = FakeConnection(message(0, [])), FakeConnection(message(0, [], "b"))
        self.assert_waits(old, old, old, new, new, limits=[3, 6, 12, 3, 6])

    def test_limit_stays(self) -> None:
        """Neither what cannot be understood nor what on_message refuses makes a wait short."""
        nonsense, refused = FakeConnection("nonsense"), FakeConnection(message(0, [2]))
        self.assert_waits(refused, refused, nonsense, refused, limits=[3, 6, 12, 24])

    def test_retry_delay(self) -> None:
        """It is the first limit, but none is above 30 s; it must be above 0."""
        self.assert_waits(FakeConnection(), FakeConnection(), limits=[1, 2], retry_delay=1)
        self.assert_waits(FakeConnection(), limits=[30], retry_delay=1e9)
        for delay in 0, -1, math.nan:
            with self.subTest(delay=delay), self.assertRaises(ValueError):
                WebSocketClient("ws://localhost/", delay)
