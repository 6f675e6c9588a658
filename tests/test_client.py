"""What only a network shows of a client: handshakes, their failures, silence, a flood.

The rule and the waits are left to test_rule.py, broken links to test_faults_network.py.
"""

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler

from client import WebSocketClient
from server import make_app
from tests import support
from tests.support import Recorder, fast_runner, following, message, new_handler, own_port, until
from tests.test_server import tls_context


@contextlib.asynccontextmanager
async def foreign_server(handler: type[RequestHandler]) -> AsyncIterator[str]:
    """Serve a handler that is not ours, and yield the URL."""
    listener, port = bind_unused_port()
    http = HTTPServer(Application([("/", handler)]))
    http.add_socket(listener)
    try:
        yield f"ws://127.0.0.1:{port}/"
    finally:
        http.stop()
        await http.close_all_connections()


class ClientCase(support.QuietCase):
    async def lines(self, client: WebSocketClient, count: int = 3) -> list[str]:
        """Follow until the client has logged so many lines or tracebacks; return these."""
        with self.assertLogs("client", "WARNING") as logs:
            async with following(client):
                await until(lambda: len(logs.output) >= count)
        return logs.output[:count]


class HandshakeTests(ClientCase):
    async def check_answer(self, answer: bytes, reason: str) -> None:
        """Each of three tries that are answered so must be one line with the reason."""

        class Answering(RequestHandler):
            async def get(self) -> None:
                stream = self.detach()
                with contextlib.suppress(StreamClosedError):  # the client has been stopped
                    await stream.write(answer + b"\r\nContent-Length: 0\r\n\r\n")
                    await stream.read_until_close()

        with self.subTest(answer=answer):
            async with foreign_server(Answering) as url:
                lines = await self.lines(Recorder(url))
            for line in lines:
                self.assertRegex(line, f"^.*cannot connect: .*{reason}.*$")

    async def test_refusal(self) -> None:
        """The line has the status and what the server says; no redirect is followed."""
        for status in 301, 302, 303, 307, 308, 400, 403, 404, 500, 503:
            await self.check_answer(b"HTTP/1.1 %d no\r\nLocation: /there" % status, f"{status}.*no")

    async def test_malformed_answer(self) -> None:
        """Whatever is no answer to a handshake is one line a try, too."""
        # Tornado has a traceback for some of them, which `client.main` mutes.
        tornado = logging.getLogger("tornado.application")
        self.enterContext(mock.patch.object(tornado, "disabled", True))
        no_key = b"HTTP/1.1 101 Go on\r\nUpgrade: websocket\r\nConnection: Upgrade"
        wrong_key = no_key + b"\r\nSec-WebSocket-Accept: " + b"x" * 28
        for answer in b"HTTP/1.1 200 OK", b"garbage", b"HTTP/1.1 9", wrong_key, no_key:
            await self.check_answer(answer, "")

    async def test_no_server(self) -> None:
        """A port where nobody listens, and a host that does not exist: one line a try."""
        nobody = f"127.0.0.1:{self.enterContext(own_port())}"
        for host in nobody, "no-such-host.invalid", f"{'long' * 16}.example":
            with self.subTest(host=host):
                for line in await self.lines(Recorder(f"ws://{host}/")):
                    self.assertRegex(line, "^.*cannot connect: .+$")

    async def test_localhost(self) -> None:
        """A client finds a server that listens on only the second address of localhost."""
        real = socket.getaddrinfo

        def both(host: str, *arguments: Any, **options: Any) -> list[Any]:
            return [*real("::1", *arguments, **options), *real("127.0.0.1", *arguments, **options)]

        async with foreign_server(WebSocketHandler) as url:
            client = Recorder(url.replace("127.0.0.1", "localhost"))
            with mock.patch("socket.getaddrinfo", both):
                async with following(client):
                    await until(lambda: client.connected)

    async def test_certificate_that_is_not_trusted(self) -> None:
        """Each try is one line, unless the client takes any certificate."""

        class Careless(Recorder):
            def request(self, url: str) -> HTTPRequest:
                return HTTPRequest(url, validate_cert=False)

        async with support.serving(make_app(new_handler()), ssl=tls_context()) as url:
            for line in await self.lines(Recorder(url)):
                self.assertRegex(line, "^.*cannot connect: .*certificate verify failed.*$")
            async with following(client := Careless(url)):
                await until(lambda: client.epoch)

    @support.needs("trustme")
    async def test_certificate_of_another_host(self) -> None:
        """Each try is one line, though the client trusts the authority."""
        import trustme

        authority = trustme.CA()
        trusted = self.enterContext(authority.cert_pem.tempfile())
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("other.example").configure_cert(context)

        class Trusting(Recorder):
            def request(self, url: str) -> HTTPRequest:
                return HTTPRequest(url, ca_certs=trusted)

        async with support.serving(make_app(new_handler()), ssl=context) as url:
            for line in await self.lines(Trusting(url)):
                self.assertRegex(line, "^.*cannot connect: .*not valid for '127.0.0.1'.*$")

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
            async with foreign_server(Once) as url, following(Recorder(f"{url}?token=s3cret")):
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

        async with foreign_server(Slow) as url:
            async with following(Recorder(url)):
                await asked.wait()
            go_on.set()
            await until(lambda: codes)
        self.assertEqual(codes, [1000])


class SilentServerTests(ClientCase):
    def test_ping_and_stop(self) -> None:
        """A ping without an answer ends the connection, and `stop` ends: here on a faster clock."""

        class Silent(WebSocketHandler):
            async def open(self) -> None:
                await asyncio.Event().wait()  # neither reads nor writes

        async def check() -> None:
            async with foreign_server(Silent) as url:
                with self.assertLogs("client", "WARNING") as logs:
                    async with following(client := Recorder(url)):
                        await until(lambda: "connection lost" in "".join(logs.output))
                async with following(client):
                    await until(lambda: client.connected)

        with fast_runner(20) as runner:
            runner.run(check())


class FloodTests(support.ServedCase):
    async def test_flood(self) -> None:
        """What a busy client cannot take, 12 MB, waits at the server, and comes in longer lists."""
        free = threading.Event()
        self.addCleanup(free.set)

        class Busy(Recorder):
            def on_message(self, samples: list[Any]) -> None:
                free.wait()
                super().on_message(samples)

        self.stream.message_size = 1
        busy, control = Busy(self.url), Recorder(self.url)
        busy.start()
        async with following(control):
            await until(lambda: len(self.handler.clients) == 2)
            for number in range(400):  # more than the buffers of the kernel hold
                self.handler.send_message([f"{number:030000}"])
            await until(lambda: len(control.samples) == 400)
            self.assertLess(min(client.position for client in self.handler.clients), 400)
        free.set()
        await until(lambda: len(busy.samples) == 400)
        await asyncio.to_thread(busy.stop)
        self.assertEqual(busy.samples, control.samples)
        self.assertLess(len(busy.lengths), 400)
