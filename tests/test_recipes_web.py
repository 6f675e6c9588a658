"""The recipes for browsers, in a real one and behind a real nginx: the page, and its events.

That their servers feed a client of the stream and end quietly is in test_recipes.py.
"""

import asyncio
import base64
import itertools
import json
import os
import random
import re
import shutil
import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.web import Application, RequestHandler, StaticFileHandler
from tornado.websocket import WebSocketClientConnection, websocket_connect

from client import WebSocketClient
from tests.recipes import events, page
from tests.support import TIMEOUT, accepts, free_port, until, wait_until
from tests.test_recipes import RECIPES, Program, RecipeCase, test

CHROMIUM = shutil.which("chromium")
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

needs_chromium = unittest.skipUnless(CHROMIUM, "needs chromium: see tests/requirements.txt")
needs_nginx = unittest.skipUnless(NGINX, "needs nginx: see tests/requirements.txt")


async def open_events(
    address: str, last: str = ""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for the events, after the last one that came, and return the response by hand."""
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    header = f"Last-Event-ID: {last}\r\n" if last else ""
    writer.write(f"GET /events HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode())
    return reader, writer


class WebCase(RecipeCase):
    """A test whose server also serves the page, and events of a stream of their own."""

    def listen(self, port: int = 0) -> None:
        """Serve what both recipes serve."""
        self.stream: type[events.EventStream] = type("FreshEvents", (events.EventStream,), {})
        super().listen(port)
        application: Any = self.http_server.request_callback
        self.application: Application = application
        files = {"path": RECIPES, "default_filename": "page.html"}
        page = (r"/(|stream\.js)", StaticFileHandler, files)
        with_events = ("/events.html", events.Page), ("/events", self.stream)
        self.application.add_handlers(".*", [page, *with_events])
        self.address = f"127.0.0.1:{self.port}"

    async def close(self) -> None:
        """Close the events, too."""
        for handler in list(events.EventStream.clients):
            handler.close()
        await super().close()
        await until(lambda: not events.EventStream.clients)

    async def nginx(self, location: str) -> str:
        """Start nginx with one location, and return its address."""
        port, conf = free_port(), self.folder / "nginx.conf"
        parts = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
        paths = "".join(f"{part}_temp_path {self.folder}/{part};" for part in parts)
        conf.write_text(
            f"daemon off; master_process off; pid {self.folder}/pid; events {{}}\n"
            f"http {{ access_log off; {paths}\n"
            f"server {{ listen 127.0.0.1:{port}; {location} }} }}\n"
        )
        self.program(NGINX, "-p", self.folder, "-c", conf, "-e", self.folder / "errors")
        await until(lambda: accepts(port))
        return f"127.0.0.1:{port}"


class Tab:
    """A page in a browser, driven by the DevTools protocol."""

    def __init__(self, connection: WebSocketClientConnection) -> None:
        self.connection = connection
        self.numbers = itertools.count(1)

    async def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol, and return its result."""
        number = next(self.numbers)
        call = {"id": number, "method": method, "params": parameters}
        await self.connection.write_message(json.dumps(call))
        while True:
            frame = await self.connection.read_message()
            assert frame is not None, "the browser has gone"
            answer = json.loads(frame)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    async def value(self, expression: str) -> Any:
        """Evaluate JavaScript in the page, and await it where it is a promise."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait until JavaScript is true in the page."""
        async with asyncio.timeout(TIMEOUT):
            while not await self.value(expression):
                await asyncio.sleep(0.02)


class ChromiumCase(WebCase):
    """A test with a headless Chromium, which all tests of a class share."""

    profile: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.profile = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.profile, ignore_errors=True)
        options = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
            --disable-background-networking --disable-component-update --disable-sync
            --disable-dev-shm-usage --no-proxy-server --remote-debugging-port=0"""
        profile = f"--user-data-dir={cls.profile}"
        chromium = Program(cls.profile, CHROMIUM, *options.split(), profile, "about:blank")
        cls.addClassCleanup(chromium.wait)
        cls.addClassCleanup(chromium.terminate)
        wait_until(cls.devtools)

    @classmethod
    def devtools(cls) -> str:
        """Return the port that Chromium has chosen, once it has."""
        path = cls.profile / "DevToolsActivePort"
        lines = path.read_text().split("\n") if path.exists() else []
        return lines[0] if len(lines) > 1 else ""

    def setUp(self) -> None:
        self.tabs: list[Tab] = []
        super().setUp()

    def tearDown(self) -> None:
        async def end() -> None:
            for tab in self.tabs:
                await tab.call("Page.close")
                while await tab.connection.read_message() is not None:
                    pass
                tab.connection.close()

        self.io_loop.run_sync(end)
        super().tearDown()

    async def browse(self, url: str) -> Tab:
        """Open a page in a tab of its own."""
        new = HTTPRequest(f"http://127.0.0.1:{self.devtools()}/json/new?{url}", "PUT", body="")
        target = json.loads((await AsyncHTTPClient().fetch(new)).body)
        tab = Tab(await websocket_connect(target["webSocketDebuggerUrl"]))
        self.tabs.append(tab)
        await tab.until(f"location == '{url}' && document.readyState === 'complete'")
        return tab

    async def assert_shown(self, tab: Tab, trials: int, ones: int, missed: int) -> None:
        """Check what the page shows, when it has drawn so many trials and is live."""
        await tab.until(f"part('trials').textContent === '{trials}'")
        state = await tab.value("[alpha - 1, alpha + beta - 2, part('missed').textContent]")
        self.assertEqual(state, [ones, trials, str(missed)])


@needs_chromium
class PageTests(ChromiumCase):
    @test
    async def test_shows_the_posterior_of_a_python_client(self) -> None:
        """The page shows the mean that a Python client has, and says that it is live."""
        client = WebSocketClient(self.url)
        self.follow(client)
        tab = await self.browse(f"http://{self.address}/")
        coin = random.Random(1)
        self.server.send_message([int(coin.random() < 0.72) for _ in range(200)])
        await until(lambda: client.position == 200)
        await self.assert_shown(tab, 200, int(client.posterior.alpha) - 1, 0)
        mean = await tab.value("part('mean').textContent")
        self.assertEqual(mean, f"{client.posterior.mean:.4f}")
        self.assertEqual(await tab.value("part('state').textContent"), "live")
        middle = await tab.value("+part('middle').getAttribute('x1')")
        self.assertAlmostEqual(middle, client.posterior.mean)

    @test
    async def test_knows_the_interval(self) -> None:
        """The flat prior has 0.025 to 0.975; Beta(2, 1), whose quantiles are roots, 0.158 to 0.987."""
        tab = await self.browse(f"http://{self.address}/")
        await tab.until("part('interval').textContent === '0.025 – 0.975'")
        self.server.send_message([1])
        await tab.until("part('interval').textContent === '0.158 – 0.987'")

    @test
    async def test_resumes_counts_gaps_and_a_new_run(self) -> None:
        """After a drop it goes on where it was; it says what it missed; a new run counts too."""
        self.server.history_size = 10
        tab = await self.browse(f"http://{self.address}/")
        self.server.send_message([1, 0, 1, 1])
        await self.assert_shown(tab, 4, 3, 0)
        await tab.value("{const random = Math.random; Math.random = () => 0.5 + random() / 2}")
        for handler in list(self.server.clients):
            handler.close(1001)
        await tab.until("/^reconnecting in \\d s$/.test(part('state').textContent)")
        self.server.send_message([0, 0, 1])
        await self.assert_shown(tab, 7, 4, 0)
        for handler in list(self.server.clients):
            handler.close(1001)
        await tab.until("part('state').textContent !== 'live'")
        self.server.send_message([1] * 25)
        await self.assert_shown(tab, 17, 14, 15)
        await self.restart()
        self.server.history_size = 10
        self.server.send_message([0] * 12)
        await self.assert_shown(tab, 27, 14, 17)
        self.assertEqual(await tab.value("[epoch, position]"), [self.server.epoch, 12])

    @test
    async def test_counts_an_overlap_once(self) -> None:
        """Where a message overlaps with the position, only the rest of it is counted."""
        tab = await self.browse(f"http://{self.address}/")
        await tab.until("epoch")
        self.server.send_message([1, 0])
        await self.assert_shown(tab, 2, 1, 0)
        message = {"epoch": self.server.epoch, "offset": 1, "samples": [0, 1]}
        await tab.value(f"take({{data: {json.dumps(json.dumps(message))}}})")
        await self.assert_shown(tab, 3, 2, 0)

    @test
    async def test_asks_again_for_what_it_could_not_count(self) -> None:
        """Samples at which the model raises are not counted, but asked for again."""
        tab = await self.browse(f"http://{self.address}/")
        await tab.until("epoch")
        await tab.value("{const count = onSamples; onSamples = () => {onSamples = count; throw 0}}")
        self.server.send_message([1, 0, 1])
        await self.assert_shown(tab, 3, 2, 0)

    @test
    async def test_doubles_the_wait_up_to_30_s(self) -> None:
        """The limit of the wait is doubled up to 30 s, and is 3 s again after a message."""
        tab = await self.browse(f"http://{self.address}/")
        await tab.until("epoch")
        limits = "Array.from({length: 6}, () => (again(() => 0, ''), limit))"
        self.assertEqual(await tab.value(limits), [6, 12, 24, 30, 30, 30])
        self.server.send_message([1])
        await tab.until("limit === 3")

    @needs_nginx
    @test
    async def test_works_under_a_path_behind_nginx(self) -> None:
        """With the location that page.py gives, the page follows the stream under /app/."""
        (location,) = re.findall(r"location .*?\n    }", page.__doc__ or "", re.DOTALL)
        location = location.replace("localhost:8765", self.address)
        tab = await self.browse(f"http://{await self.nginx(location)}/app/")
        self.server.send_message([1, 0, 1])
        await self.assert_shown(tab, 3, 2, 0)

    @test
    async def test_fits_a_small_screen_in_both_schemes(self) -> None:
        """At 360 pixels nothing is cut off, and a dark scheme has a dark page."""
        tab = await self.browse(f"http://{self.address}/")
        coin = random.Random(1)
        self.server.send_message([int(coin.random() < 0.72) for _ in range(640)])
        await tab.until("part('trials').textContent === '640'")
        grey = "+getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
        pictures = os.environ.get("PICTURES")  # a folder, for those who want to look at them
        for scheme, width in itertools.product(("light", "dark"), (360, 800)):
            size = {"width": width, "height": 520, "deviceScaleFactor": 1, "mobile": False}
            await tab.call("Emulation.setDeviceMetricsOverride", **size)
            feature = {"name": "prefers-color-scheme", "value": scheme}
            await tab.call("Emulation.setEmulatedMedia", features=[feature])
            self.assertEqual(await tab.value(f"{grey} < 128"), scheme == "dark")
            self.assertLessEqual(await tab.value("document.documentElement.scrollWidth"), width)
            fits = "part('interval').scrollWidth <= part('interval').clientWidth"
            self.assertTrue(await tab.value(fits))
            if pictures:
                picture = await tab.call("Page.captureScreenshot", format="png")
                path = Path(pictures) / f"page-{scheme}-{width}.png"
                path.write_bytes(base64.b64decode(picture["data"]))


class OriginTests(WebCase):
    @test
    async def test_lets_in_only_its_own_and_trusted_sites(self) -> None:
        """The server's own pages and the trusted site pass, and no others."""
        (origins,) = re.findall(r'trusted_origins"\] = (.*)', page.__doc__ or "")
        self.application.settings["trusted_origins"] = json.loads(origins)

        async def status(origin: str) -> int:
            try:
                request = HTTPRequest(self.url, headers={"Origin": origin})
                connection = await websocket_connect(request)
            except HTTPClientError as error:
                return error.code
            connection.close()
            while await connection.read_message() is not None:
                pass
            return 101

        for origin in "https://example.org", f"http://{self.address}":
            self.assertEqual(await status(origin), 101)
        for origin in "http://example.org", "https://example.org.invalid", "null":
            with self.assertLogs("tornado.access", "WARNING"):
                self.assertEqual(await status(origin), 403, origin)


class EventStreamTests(WebCase):
    async def read(self, address: str, pattern: str, last: str = "") -> str:
        """Return what comes until the pattern matches, then go away."""
        reader, writer = await open_events(address, last)
        text = ""
        while not re.search(pattern, text, re.DOTALL):
            data = await reader.read(65_536)
            assert data, text
            text += data.decode()
        writer.close()
        return text

    @test
    async def test_numbers_events_by_the_next_sample(self) -> None:
        """Each event's id is the position after it, and Last-Event-ID starts exactly there."""
        self.stream.message_size = 2
        self.stream.send_message([1, 0, 1])
        epoch = self.stream.epoch
        text = await self.read(self.address, "id.*id.*\n\n")
        self.assertEqual(re.findall("id: (.*)", text), [f"{epoch}:2", f"{epoch}:3"])
        text = await self.read(self.address, "id.*\n\n", f"{epoch}:2")
        self.assertIn('"offset": 2, "samples": [1]}', text)
        text = await self.read(self.address, "id.*\n\n", "0badcafe:2")
        self.assertIn('"offset": 0, "samples": [1, 0]}', text)

    @test
    async def test_refuses_as_the_websocket_does(self) -> None:
        """An impossible Last-Event-ID is answered with 400 and the reason."""
        for offset in "1", "-1", "1_0", "", "²":
            with self.assertLogs("tornado.access", "WARNING"):
                text = await self.read(self.address, "\r\n\r\n", f"{self.stream.epoch}:{offset}")
            self.assertRegex(text, "^HTTP/1.1 400 offset must be")

    @needs_nginx
    @test
    async def test_comes_at_once_through_nginx(self) -> None:
        """An nginx without any setting passes on the first, small event while it is the only one."""
        location = f"location / {{ proxy_pass http://{self.address}; }}"
        text = await self.read(await self.nginx(location), "id.*\n\n")
        self.assertIn('"samples": []', text)

    @test
    async def test_keeps_one_unfinished_write_for_a_slow_reader(self) -> None:
        """A client that does not read costs one write, and gets the rest as one event."""
        reader, writer = await open_events(self.address)
        await until(lambda: events.EventStream.clients)
        (handler,) = events.EventStream.clients
        sample = "x" * 100_000
        turns = 0
        while turns < 50:  # of the event loop without progress: the kernel takes no more
            self.assertLess(self.stream.end, 2000)
            if not handler.writing:
                self.stream.send_message([sample])
                turns = 0
            await asyncio.sleep(0.005)
            turns += 1
        position = handler.position
        for _ in range(20):
            self.stream.send_message([sample])
            await asyncio.sleep(0)
        self.assertEqual(handler.position, position)
        text = b""
        async with asyncio.timeout(TIMEOUT):
            while f"id: {self.stream.epoch}:{self.stream.end}\n".encode() not in text:
                text = text[-100:] + await reader.read(65_536)
        self.assertEqual(handler.position, self.stream.end)
        writer.close()
        await until(lambda: not events.EventStream.clients)


class BadGateway(RequestHandler):
    """A proxy whose server is away."""

    def get(self) -> None:
        self.set_status(502)


@needs_chromium
class EventSourceTests(ChromiumCase):
    @test
    async def test_goes_on_after_a_drop_and_after_a_502(self) -> None:
        """The browser comes back where it was; after a 502 the page does, and counts once."""
        tab = await self.browse(f"http://{self.address}/events.html")
        self.stream.send_message([1, 0, 1])
        await self.assert_shown(tab, 3, 2, 0)
        (handler,) = events.EventStream.clients
        handler.close()
        await until(lambda: handler not in events.EventStream.clients)
        self.stream.send_message([1, 1])
        await self.assert_shown(tab, 5, 4, 0)
        (handler,) = events.EventStream.clients
        self.assertEqual(handler.request.headers["Last-Event-ID"], f"{self.stream.epoch}:3")

        self.http_server.request_callback = Application([("/events", BadGateway)])
        with self.assertLogs("tornado.access", "ERROR"):
            handler.close()
            await tab.until("limit > 3")
            self.http_server.request_callback = self.application
            self.stream.send_message([0])
            await self.assert_shown(tab, 6, 4, 0)


class RunTests(RecipeCase):
    @test
    async def test_serves_the_page_and_ends_its_events(self) -> None:
        """Both programs serve page and script; at Ctrl-C the events come to their proper end."""
        for name in "page", "events":
            program = self.copy(name)
            address = urlsplit(await program.line()).netloc
            for path, content in ("", b"Probability of a 1"), ("stream.js", b"function take"):
                fetched = await AsyncHTTPClient().fetch(f"http://{address}/{path}")
                self.assertIn(content, fetched.body)
            if name == "events":
                reader, writer = await open_events(address)
                await reader.readuntil(b"data:")
            await self.interrupt(program)
        self.assertTrue((await reader.read()).endswith(b"\r\n0\r\n\r\n"))
        writer.close()
