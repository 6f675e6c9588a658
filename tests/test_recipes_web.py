"""The recipes for browsers, in a real one and behind a real nginx: the page, and its events.

That their servers feed a client of the stream and end quietly is in test_recipes.py.
"""

import asyncio
import importlib
import itertools
import json
import random
import re
from typing import Any, cast
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient
from tornado.web import Application, StaticFileHandler

from client import WebSocketClient
from tests.faults import raw
from tests.recipes import events, page
from tests.support import HANDSHAKE, TIMEOUT, accepts, free_port, until
from tests.test_recipes import RECIPES, RecipeCase, needs, which

EVENTS = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"


class WebCase(RecipeCase):
    """A test whose server also serves both pages, and events of a stream of their own."""

    def listen(self, port: int = 0) -> None:
        """Serve what both recipes serve."""
        self.stream: type[events.EventStream] = type("FreshEvents", (events.EventStream,), {})
        super().listen(port)
        self.application = cast(Application, self.http_server.request_callback)
        files = {"path": RECIPES, "default_filename": "page.html"}
        with_events = ("/events.html", events.Page), ("/events", self.stream)
        pages: list[Any] = [(r"/(|stream\.js)", StaticFileHandler, files), *with_events]
        self.application.add_handlers(".*", pages)
        self.address = f"127.0.0.1:{self.port}"

    async def close(self) -> None:
        """Close the events, too."""
        for handler in list(events.EventStream.clients):
            handler.close()
        await super().close()
        await until(lambda: not events.EventStream.clients)

    async def read(
        self, address: str, pattern: str, header: str = "", request: bytes = EVENTS
    ) -> str:
        """Return what answers a request with one more header until the pattern matches."""
        async with raw(f"http://{address}", request[:-2] + f"{header}\r\n".encode()) as peer:
            return (await peer.read_until_regex(f"(?s){pattern}".encode())).decode()


@needs("playwright", program="chromium")
class PageTests(WebCase):
    playwright: Any
    page: Any
    value: Any  # evaluates JavaScript in the page
    shows: Any  # waits until it is true

    def tearDown(self) -> None:
        self.io_loop.run_sync(self.playwright.stop)
        super().tearDown()

    async def browse(self, address: str) -> None:
        """Open a page in a headless Chromium of its own, and wait until it is live."""
        start = importlib.import_module("playwright.async_api").async_playwright().start
        self.playwright = await start()
        options: Any = {"executable_path": which("chromium"), "args": ["--no-sandbox"]}
        browser = await self.playwright.chromium.launch(**options)
        self.page = await browser.new_page()
        self.page.set_default_timeout(TIMEOUT * 1_000)
        self.value, self.shows = self.page.evaluate, self.page.wait_for_function
        await self.page.goto(f"http://{address}")
        await self.shows("part('state').textContent === 'live'")

    async def counted(self, trials: int, ones: int, missed: int) -> None:
        """Check what the page shows, when it has drawn so many trials."""
        await self.shows(f"part('trials').textContent === '{trials}'")
        state = await self.value("[alpha - 1, alpha + beta - 2, part('missed').textContent]")
        self.assertEqual(state, [ones, trials, str(missed)])

    async def test_shows_the_posterior_of_a_python_client(self) -> None:
        """It shows the mean that a Python client has, and the 95 % interval of two known cases."""
        client = WebSocketClient(self.url)
        self.follow(client)
        await self.browse(f"{self.address}/")
        await self.shows("part('interval').textContent === '0.025 – 0.975'")
        self.server.send_message([1])
        await self.shows("part('interval').textContent === '0.158 – 0.987'")
        self.server.send_message([int(random.random() < 0.72) for _ in range(200)])
        await until(lambda: client.position == 201)
        mean = client.posterior.mean
        await self.counted(201, int(client.posterior.alpha) - 1, 0)
        self.assertEqual(await self.value("part('mean').textContent"), f"{mean:.4f}")
        self.assertAlmostEqual(await self.value("+part('middle').getAttribute('x1')"), mean)

    async def test_resumes_counts_gaps_and_a_new_run(self) -> None:
        """After a drop it goes on where it was; it says what it missed; a new run counts too."""
        self.server.history_size = 10
        await self.browse(f"{self.address}/")
        self.server.send_message([1, 0, 1, 1])
        await self.counted(4, 3, 0)
        await self.value("random = Math.random; Math.random = () => 0.5 + random() / 2; 0")
        for samples, counts in ([0, 0, 1], (7, 4, 0)), ([1] * 25, (17, 14, 15)):
            for handler in list(self.server.clients):
                handler.close(1001, "going away")
            await self.shows("/reconnecting in \\d s: going away$/.test(part('state').textContent)")
            self.server.send_message(samples)
            await self.counted(*counts)
        await self.restart()
        self.server.history_size = 10
        self.server.send_message([0] * 12)
        await self.counted(27, 14, 17)
        self.assertEqual(await self.value("[epoch, position]"), [self.server.epoch, 12])

    async def test_counts_each_sample_once(self) -> None:
        """An overlap is skipped; what the model refuses comes again, after waits that double."""
        await self.browse(f"{self.address}/")
        self.server.send_message([1, 0])
        await self.counted(2, 1, 0)
        message = {"epoch": self.server.epoch, "offset": 1, "samples": [0, 1]}
        await self.value(f"take({{data: {json.dumps(json.dumps(message))}}})")
        await self.counted(3, 2, 0)
        limits = "Array.from({length: 6}, () => (again(() => 0, ''), limit))"
        self.assertEqual(await self.value(limits), [6, 12, 24, 30, 30, 30])
        self.server.send_message([1])  # which was taken already
        await self.shows("limit === 3")
        await self.value("count = onSamples; onSamples = () => {onSamples = count; throw 0}; 0")
        self.server.send_message([1, 0, 1])
        await self.counted(6, 4, 0)

    @needs(program="nginx")
    async def test_works_under_a_path_behind_nginx(self) -> None:
        """The page follows under /app/ where page.py says so; a small event passes at once."""
        (page_location,) = re.findall(r"location .*?\n    }", page.__doc__ or "", re.DOTALL)
        location = f"location / {{ proxy_pass http://{self.address}; }}"
        parts = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
        paths = "".join(f"{part}_temp_path {self.folder}/{part};" for part in parts)
        port, conf = free_port(), self.folder / "nginx.conf"
        conf.write_text(
            f"daemon off; master_process off; pid {self.folder}/pid; events {{}}\n"
            f"http {{ access_log off; {paths} server {{ listen 127.0.0.1:{port};\n"
            f"{location} {page_location.replace('localhost:8765', self.address)} }} }}\n"
        )
        self.program(which("nginx"), "-p", self.folder, "-c", conf, "-e", self.folder / "errors")
        await until(lambda: accepts(port))
        await self.browse(f"127.0.0.1:{port}/app/")
        self.server.send_message([1, 0, 1])
        await self.counted(3, 2, 0)
        self.assertIn('"samples": []', await self.read(f"127.0.0.1:{port}", "id.*\n\n"))

    async def test_fits_a_small_screen_in_both_schemes(self) -> None:
        """At 360 pixels nothing is cut off or jumps, whatever the state; a dark scheme is dark."""
        await self.browse(f"{self.address}/")
        grey = "+getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"
        fits = "part('interval').scrollWidth <= part('interval').clientWidth"
        height = "onState('{}', true); document.body.scrollHeight"
        for scheme, width in itertools.product(("light", "dark"), (360, 1280)):
            await self.page.set_viewport_size({"width": width, "height": 520})
            await self.page.emulate_media(color_scheme=scheme)
            live = await self.value(height.format("live"))
            self.assertEqual(await self.value(f"{grey} < 128"), scheme == "dark")
            self.assertLessEqual(await self.value("document.documentElement.scrollWidth"), width)
            self.assertTrue(await self.value(fits))
            self.assertEqual(await self.value(height.format("reconnecting in 30 s")), live)
            await self.value("onState('reconnecting in 30 s: ' + 'x'.repeat(120), false)")
            self.assertLessEqual(await self.value("document.documentElement.scrollWidth"), width)

    async def test_events_go_on_after_a_drop_and_after_an_error(self) -> None:
        """The browser comes back where it was; after an error of a proxy the page does."""
        await self.browse(f"{self.address}/events.html")
        self.stream.send_message([1, 0, 1])
        await self.counted(3, 2, 0)
        (handler,) = events.EventStream.clients
        handler.close()
        await until(lambda: handler not in events.EventStream.clients)
        self.stream.send_message([1, 1])
        await self.counted(5, 4, 0)
        (handler,) = events.EventStream.clients
        self.assertEqual(handler.request.headers["Last-Event-ID"], f"{self.stream.epoch}:3")
        self.http_server.request_callback = Application()  # a proxy whose server is away
        handler.close()
        await self.shows("limit > 3")
        self.http_server.request_callback = self.application
        self.stream.send_message([0])
        await self.counted(6, 4, 0)


class ServerTests(WebCase):
    async def test_numbers_events_by_the_next_sample(self) -> None:
        """Each event's id is the position after it, and Last-Event-ID starts exactly there."""
        self.stream.message_size = 2
        self.stream.send_message([1, 0, 1])
        epoch = self.stream.epoch
        text = await self.read(self.address, "id.*id.*\n\n")
        self.assertEqual(re.findall("id: (.*)", text), [f"{epoch}:2", f"{epoch}:3"])
        for last, begin in (f"{epoch}:2", '2, "samples": [1]'), ("0bad:2", '0, "samples": [1, 0]'):
            text = await self.read(self.address, "id.*\n\n", f"Last-Event-ID: {last}\r\n")
            self.assertIn(f'"offset": {begin}}}', text)
        for offset in "4", "-1", "1_0", "", "²":
            header = f"Last-Event-ID: {epoch}:{offset}\r\n"
            text = await self.read(self.address, "\r\n\r\n", header)
            self.assertRegex(text, "^HTTP/1.1 400 offset must be")

    async def test_keeps_one_unfinished_write_for_a_slow_reader(self) -> None:
        """A client that does not read costs one write, and gets the rest as one event."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(EVENTS)
        await until(lambda: events.EventStream.clients)
        (handler,) = events.EventStream.clients
        turns = 0
        while turns < 50:  # of the event loop without progress: the kernel takes no more
            self.assertLess(self.stream.end, 2000)
            if not handler.writing:
                self.stream.send_message(["x" * 100_000])
                turns = 0
            await asyncio.sleep(0.005)
            turns += 1
        position = handler.position
        for _ in range(20):
            self.stream.send_message(["x" * 100_000])
            await asyncio.sleep(0)
        self.assertEqual(handler.position, position)
        text = b""
        while b"id: %s:%d\n" % (self.stream.epoch.encode(), self.stream.end) not in text:
            text = text[-100:] + await reader.read(65_536)
        self.assertEqual(handler.position, self.stream.end)
        writer.close()
        await until(lambda: not events.EventStream.clients)

    async def test_page_lets_in_only_its_own_and_trusted_sites(self) -> None:
        """The server's own pages and the trusted site that page.py names pass, and no others."""
        (origins,) = re.findall(r'trusted_origins"\] = (.*)', page.__doc__ or "")
        self.application.settings["trusted_origins"] = json.loads(origins)
        for origin, status in (
            *(("https://example.org", 101), ("http://localhost", 101), ("http://example.org", 403)),
            *(("https://example.org.invalid", 403), ("null", 403)),
        ):
            header = f"Origin: {origin}\r\n"
            text = await self.read(self.address, "\r\n\r\n", header, HANDSHAKE)
            self.assertRegex(text, f"^HTTP/1.1 {status} ")

    async def test_programs(self) -> None:
        """Both programs serve page and script; at Ctrl-C the events come to their proper end."""
        for name in "page", "events":
            program = self.copy(name)
            address = urlsplit(await program.line()).netloc
            for path, content in ("", b"Probability of a 1"), ("stream.js", b"function take"):
                fetched = await AsyncHTTPClient().fetch(f"http://{address}/{path}")
                self.assertIn(content, fetched.body)
            if name == "events":
                ending = asyncio.ensure_future(self.read(address, "\r\n0\r\n\r\n$"))
                await until(lambda: "connected, 1 in all" in program.err())  # noqa: B023
            await self.interrupt(program)
        await ending
