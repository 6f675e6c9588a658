"""The README's recipes for browsers, other libraries, Server-Sent Events and more machines."""

import asyncio
import base64
import contextlib
import gc
import importlib
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import weakref
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.testing import gen_test
from tornado.web import Application, StaticFileHandler
from tornado.websocket import WebSocketClientConnection, websocket_connect

from client import WebSocketClient
from tests.support import (
    ROOT,
    TIMEOUT,
    PairCase,
    Recorder,
    accepts,
    free_port,
    readme_blocks,
    until,
    wait_until,
)

CHROMIUM = shutil.which("chromium")
NATS_SERVER = shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
BROWSER = "In a browser"
LIBRARIES = "From other libraries"
EVENTS = "Server-Sent Events"
MACHINES = "More than one machine"

test = gen_test(timeout=20 * TIMEOUT)  # until() fails earlier, and says where
needs_chromium = unittest.skipUnless(CHROMIUM, "needs chromium: see tests/requirements.txt")
needs_nats_server = unittest.skipUnless(
    NATS_SERVER, "needs nats-server: see tests/requirements.txt"
)


def needs(module: str) -> Callable[[Any], Any]:
    """Skip what needs a package that is absent."""
    found = importlib.util.find_spec(module)
    return unittest.skipUnless(found, f"needs {module}: see tests/requirements.txt")


async def until_resumed(condition: Callable[[], object]) -> None:
    """Wait as `until` does, and once more: nats-py notices a lost consumer only after 20 s."""
    with contextlib.suppress(AssertionError):
        await until(condition)
    await until(condition)


class Forwarder:
    """One address before several servers: each connection goes to the first that lives."""

    def __init__(self, *backends: int) -> None:
        self.backends = backends
        self.requests: list[tuple[int, str]] = []  # which server, and the request's first line
        self.writers: set[asyncio.StreamWriter] = set()
        self.forwarding = 0

    async def listen(self) -> None:
        """Accept connections at `port`."""
        self.listener = await asyncio.start_server(self.forward, "127.0.0.1", 0)
        self.port: int = self.listener.sockets[0].getsockname()[1]

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy one connection in both directions until either end closes it."""
        self.forwarding += 1
        self.writers.add(writer)
        request = await reader.readline()
        for backend in self.backends if request else ():
            with contextlib.suppress(OSError):
                answers, upstream = await asyncio.open_connection("127.0.0.1", backend)
                self.requests.append((backend, request.decode()))
                self.writers.add(upstream)
                upstream.write(request)
                await asyncio.gather(self.copy(reader, upstream), self.copy(answers, writer))
                self.writers.discard(upstream)
                break
        writer.close()
        self.writers.discard(writer)
        self.forwarding -= 1

    async def copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Copy one direction, and let its end end the other one too."""
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    def drop(self) -> None:
        """Break every connection, as a network does."""
        for writer in self.writers:
            writer.transport.abort()

    async def close(self) -> None:
        """Accept no more, and break every connection."""
        self.listener.close()
        self.drop()
        await until(lambda: not self.forwarding)


class RecipeCase(PairCase):
    """A test with a folder of recipes, and an address before the server that can drop clients."""

    def setUp(self) -> None:
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.noisy: set[str] = set()  # whose standard error is not expected to be empty
        super().setUp()
        self.forwarder = Forwarder(self.port)
        self.io_loop.run_sync(self.forwarder.listen)

    def tearDown(self) -> None:
        for process in reversed(self.processes):  # the broker last
            process.kill()
            process.wait()
        self.io_loop.run_sync(self.forwarder.close)
        super().tearDown()
        for path in self.folder.glob("*.err"):
            if path.stem not in self.noisy:
                self.assertEqual(path.read_text(), "", path.stem)

    def handlers(self) -> list[Any]:
        """Return what this test's own server serves beside the stream."""
        return []

    def listen(self, port: int = 0) -> None:
        """Serve the stream and the handlers."""
        super().listen(port)
        application = self.http_server.request_callback
        assert isinstance(application, Application)
        application.add_handlers(".*", self.handlers())

    def save(self, name: str, block: str, **replacements: object) -> None:
        """Save a block; what a test must replace in it, such as a literal port, is in it."""
        for old, new in replacements.items():
            self.assertIn(old.lstrip("_"), block)
            block = block.replace(old.lstrip("_"), str(new))
        (self.folder / name).write_text(block, encoding="utf-8")

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """Run a command in the folder, with its outputs in two files."""
        search = os.pathsep.join([str(self.folder), str(ROOT)])
        with (
            open(self.folder / f"{name}.out", "ab") as output,
            open(self.folder / f"{name}.err", "ab") as errors,
        ):
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=output,
                stderr=errors,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": search, "PYTHONDONTWRITEBYTECODE": "1"},
            )
        self.processes.append(process)
        return process

    def script(self, name: str, *options: object) -> subprocess.Popen[bytes]:
        """Run a saved recipe as a user would who has it beside server.py."""
        return self.start(name, sys.executable, "-W", "error", f"{name}.py", *options)

    def lines(self, name: str) -> list[str]:
        """Return the lines that a process has written, without its remarks."""
        lines = (self.folder / f"{name}.out").read_text().splitlines()
        return [line for line in lines if not line.startswith("#")]

    async def kill(self, process: subprocess.Popen[bytes], port: int) -> None:
        """Kill a server, and wait until its port is free."""
        process.kill()
        process.wait()
        await until(lambda: not accepts(port))

    async def drop(self) -> None:
        """Break every connection, and wait until the server has seen it; some may be back then."""
        dropped = set(self.server.clients)
        self.forwarder.drop()
        await until(lambda: not dropped & self.server.clients)

    async def close_all(self) -> None:
        """Close every connection, and wait until the clients have agreed; some may be back then."""
        closing = set(self.server.clients)
        for handler in closing:
            handler.close(1001, "going away")
        await until(lambda: not closing & self.server.clients)


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


class ChromiumCase(RecipeCase):
    """A test with a headless Chromium, which all tests of a class share."""

    chromium: ClassVar[subprocess.Popen[bytes]]
    profile: ClassVar[Path]

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.profile = Path(tempfile.mkdtemp())
        cls.addClassCleanup(shutil.rmtree, cls.profile, ignore_errors=True)
        options = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
            --disable-background-networking --disable-component-update --disable-sync
            --disable-dev-shm-usage --no-proxy-server --remote-debugging-port=0"""
        cls.chromium = subprocess.Popen(
            [str(CHROMIUM), *options.split(), f"--user-data-dir={cls.profile}", "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        cls.addClassCleanup(cls.chromium.wait)
        cls.addClassCleanup(cls.chromium.terminate)
        wait_until(lambda: cls.devtools())

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

    def save_page(self, follow: str = "follow();") -> None:
        """Save the page of the recipe for a browser, which follows the stream in this way."""
        self.save("stream.js", readme_blocks(BROWSER, "js")[0])
        self.save("page.html", readme_blocks(BROWSER, "html")[0], **{"follow();": follow})

    def handlers(self) -> list[Any]:
        """Return what the application serves beside the stream: the same as the recipe's."""
        return [(r"/(page\.html|stream\.js)", StaticFileHandler, {"path": str(self.folder)})]

    @property
    def page(self) -> str:
        """The page's address, behind the forwarder."""
        return f"http://127.0.0.1:{self.forwarder.port}/page.html"

    def requests(self, path: str) -> list[str]:
        """Return the targets of the requests that came for a path."""
        targets = [request.split()[1] for _, request in self.forwarder.requests]
        return [target for target in targets if target.startswith(path)]


@needs_chromium
class BrowserTests(ChromiumCase):
    """The recipe "In a browser"."""

    def setUp(self) -> None:
        super().setUp()
        self.save_page()

    async def assert_page(self, tab: Tab, ones: int, trials: int, missed: int) -> None:
        """Check what the page shows, when it has drawn so many trials."""
        await tab.until(f"document.querySelector('pre').textContent.includes('ls {trials} ')")
        expected = f"Beta({1 + ones}, {1 + trials - ones})  trials {trials}  missed {missed}"
        self.assertEqual(await tab.value("document.querySelector('pre').textContent"), expected)

    @test
    async def test_shows_the_posterior_of_a_python_client(self) -> None:
        """The page counts what a Python client counts, and draws that density."""
        client = WebSocketClient(self.url)
        self.follow(client)
        tab = await self.browse(self.page)
        coin = random.Random(1)
        for _ in range(40):
            self.server.send_message([int(coin.random() < 0.72) for _ in range(5)])
            await asyncio.sleep(0)
        await until(lambda: client.position == 200)
        posterior = client.posterior
        await self.assert_page(tab, posterior.successes, 200, 0)
        heights = await tab.value(
            """Array.from({length: canvas.width}, (_, x) => {
                const {data} = pen.getImageData(x, 0, 1, canvas.height);
                return data.filter((value, i) => i % 4 === 3 && value).length;
            })"""
        )
        self.assertEqual(max(heights), 240)
        self.assertEqual(heights[int(posterior.successes / 200 * 640)], 240)
        levels = [" ▁▂▃▄▅▆▇█".index(block) for block in posterior.density(640)]
        for height, level in zip(heights, levels, strict=True):
            self.assertAlmostEqual(height / 240 * 8, level, delta=0.6)
        picture = await tab.call("Page.captureScreenshot", format="png")
        path = Path(tempfile.gettempdir()) / "posterior.png"  # for you to look at
        path.write_bytes(base64.b64decode(picture["data"]))

    @test
    async def test_resumes_after_a_drop(self) -> None:
        """After a drop, the page asks for its epoch and offset, and counts each sample once."""
        tab = await self.browse(self.page)
        self.server.send_message([1, 0, 1, 1])
        await self.assert_page(tab, 3, 4, 0)
        await self.drop()
        self.server.send_message([0, 0, 1])
        await self.assert_page(tab, 4, 7, 0)
        resumed = f"/websocket?epoch={self.server.epoch}&offset=4"
        self.assertEqual(self.requests("/websocket"), ["/websocket", resumed])

    @test
    async def test_says_what_it_missed(self) -> None:
        """What left the history while the page was away is missed, and the rest is counted."""
        self.server.history_size = 10
        tab = await self.browse(self.page)
        self.server.send_message([1, 0, 1])
        await self.assert_page(tab, 2, 3, 0)
        await self.drop()
        self.server.send_message([1] * 25)
        await self.assert_page(tab, 12, 13, 15)
        self.assertEqual(await tab.value("position"), 28)

    @test
    async def test_joins_late_without_missing_anything(self) -> None:
        """For a page that comes late, what had left the history before is not missed."""
        self.server.history_size = 10
        self.server.send_message([1] * 25)
        tab = await self.browse(self.page)
        await self.assert_page(tab, 10, 10, 0)
        self.assertEqual(await tab.value("position"), 25)

    @test
    async def test_counts_a_restarted_server_too(self) -> None:
        """A new epoch counts from its beginning, less what had left, and earlier counts stay."""
        tab = await self.browse(self.page)
        self.server.send_message([1, 1, 0])
        await self.assert_page(tab, 2, 3, 0)
        await self.restart()
        self.server.history_size = 10
        self.server.send_message([0] * 12)
        await self.assert_page(tab, 2, 13, 2)
        self.assertEqual(await tab.value("[epoch, position]"), [self.server.epoch, 12])

    @test
    async def test_skips_what_it_has_counted(self) -> None:
        """Where a message overlaps with the position, only the rest of it is counted."""
        self.server.prepare = lambda handler: None  # type: ignore[assignment, method-assign]
        tab = await self.browse(self.page)
        self.server.send_message([1, 0, 1])
        await self.assert_page(tab, 2, 3, 0)
        await self.drop()
        self.server.send_message([1, 1])
        await self.assert_page(tab, 4, 5, 0)

    @test
    async def test_asks_again_for_what_it_could_not_count(self) -> None:
        """Samples at which the model raises are not counted, but asked for again."""
        tab = await self.browse(self.page)
        await tab.until("epoch")
        await tab.value("{const count = onSamples; onSamples = () => {onSamples = count; throw 0}}")
        self.server.send_message([1, 0, 1])
        await self.assert_page(tab, 2, 3, 0)
        resumed = f"/websocket?epoch={self.server.epoch}&offset=0"
        self.assertEqual(self.requests("/websocket")[1:], [resumed])

    @test
    async def test_refuses_the_page_of_another_site(self) -> None:
        """A page of another origin cannot open the stream; one of the server's own can."""
        stranger = self.serve(Application(self.handlers()))
        opens = f"""new Promise((resolve) => {{
            const socket = new WebSocket("ws://127.0.0.1:{self.port}/websocket");
            socket.onopen = () => resolve(true);
            socket.onclose = () => resolve(false);
        }})"""
        own = await self.browse(f"http://127.0.0.1:{self.port}/page.html")
        self.assertTrue(await own.value(opens))
        foreign = await self.browse(f"http://{stranger}/page.html")
        self.assertFalse(await foreign.value(opens))

    @test
    async def test_runs_as_it_stands(self) -> None:
        """The recipe's files follow their own server, through a drop and through its restart."""
        port = free_port()
        self.forwarder.backends = (port,)
        # The port of the recipe is the reader's; the test takes a free one.
        self.save("page.py", readme_blocks(BROWSER, "python")[0], **{"8765": port})
        server = self.script("page")
        await until(lambda: accepts(port))
        client = Recorder(f"ws://127.0.0.1:{port}/websocket")
        self.follow(client)
        tab = await self.browse(self.page)
        await tab.until("trials > 5")
        self.forwarder.drop()
        dropped = await tab.value("trials")
        await tab.until(f"trials > {dropped + 10}")
        ones, trials, position = await tab.value("[ones, trials, position]")
        await until(lambda: client.position >= position)
        self.assertEqual((trials, ones), (position, sum(client.samples[:position])))

        await self.kill(server, port)
        await tab.until("attempt")
        ones, trials, first = await tab.value("[ones, trials, epoch]")
        self.script("page")
        await tab.until(f"epoch !== '{first}' && position > 5")
        self.assertEqual(await tab.value("trials - position"), trials)
        self.assertGreaterEqual(await tab.value("ones"), ones)
        self.assertEqual(await tab.value("missed"), 0)


class CheckOriginTests(RecipeCase):
    """The trusted origin of the recipe "In a browser"."""

    @test
    async def test_lets_one_other_site_in(self) -> None:
        """The server's own pages and those of the named site pass, and no others."""
        port = free_port()
        # The port of the recipe is the reader's; the test takes a free one.
        page, trust = readme_blocks(BROWSER, "python")
        made = "    app = make_app()\n"
        self.save("page.py", page, **{made: made + trust, "8765": port})
        self.script("page")
        await until(lambda: accepts(port))

        async def status(origin: str) -> int:
            url = f"ws://127.0.0.1:{port}/websocket"
            try:
                connection = await websocket_connect(HTTPRequest(url, headers={"Origin": origin}))
            except HTTPClientError as error:
                return error.code
            connection.close()
            while await connection.read_message() is not None:
                pass
            return 101

        self.assertEqual(await status("https://example.org"), 101)
        self.assertEqual(await status(f"http://127.0.0.1:{port}"), 101)
        refused = "http://example.org", "https://example.org.invalid", "https://an.example.org"
        for origin in (*refused, "https://evilexample.org", "null"):
            self.assertEqual(await status(origin), 403, origin)
        # Tornado writes a line for each refusal, and nothing else is written.
        self.noisy.add("page")
        errors = self.folder / "page.err"
        await until(lambda: errors.read_text().count("\n") == 5)
        for line in errors.read_text().splitlines():
            self.assertRegex(line, r"^403 GET /websocket ")


@needs("websockets")
@needs("websocket")
class OtherLibrariesTests(RecipeCase):
    """The recipe "From other libraries": both of its clients at the same time."""

    def begin(self) -> None:
        """Start both clients as they stand."""
        blocks = readme_blocks(LIBRARIES, "python")
        self.save("position.py", blocks[0])
        # The port of the recipe is the reader's; the test takes the forwarder's.
        for name, block in zip(("websockets_", "websocket_"), blocks[1:], strict=True):
            self.save(f"{name}.py", block, **{"8765": self.forwarder.port})
            self.script(name)

    async def assert_counted(self, ones: int, trials: int, missed: int) -> None:
        """Wait until both clients have counted so much."""
        expected = f"ones {ones}  trials {trials}  missed {missed}"
        for name in ("websockets_", "websocket_"):
            await until(lambda name=name: f" {trials} " in "".join(self.lines(name)[-1:]))  # type: ignore[misc]
            self.assertEqual(self.lines(name)[-1], expected, name)

    @test
    async def test_resume_after_a_drop(self) -> None:
        """Through three drops, both clients count each sample once, at their own positions."""
        self.begin()
        values = random.Random(2)
        sent: list[int] = []
        for round in range(4):
            await until(lambda: len(self.server.clients) == 2)
            for _ in range(5):
                samples = [values.getrandbits(30) for _ in range(3)]
                sent += samples
                self.server.send_message(samples)
            await self.assert_counted(sum(sent), len(sent), 0)
            if round == 1:
                await self.close_all()
            else:
                await self.drop()
            sent.append(7)
            self.server.send_message([7])
        await self.assert_counted(sum(sent), len(sent), 0)
        self.assertEqual(len(self.forwarder.requests), 10)
        for _, request in self.forwarder.requests[2:]:
            self.assertIn(f"epoch={self.server.epoch}&offset=", request)

    @needs("psutil")
    @test
    async def test_leave_no_connection_open(self) -> None:
        """After the server has closed its connection, a client holds one: the next."""
        psutil = importlib.import_module("psutil")
        self.begin()
        for _ in range(3):
            await until(lambda: len(self.server.clients) == 2)
            await self.close_all()
        await until(lambda: len(self.server.clients) == 2)
        for process in self.processes:
            self.assertEqual(len(psutil.Process(process.pid).net_connections()), 1, process.args)

    @test
    async def test_say_what_they_missed(self) -> None:
        """What left the history while both were away is missed, and the rest is counted."""
        self.server.history_size = 10
        self.begin()
        await until(lambda: len(self.server.clients) == 2)
        self.server.send_message([1, 0, 1])
        await self.assert_counted(2, 3, 0)
        await self.drop()
        self.server.send_message([1] * 25)
        await self.assert_counted(12, 13, 15)

    @test
    async def test_count_a_restarted_server_too(self) -> None:
        """A new epoch counts from its beginning, less what had left, and earlier counts stay."""
        self.begin()
        await until(lambda: len(self.server.clients) == 2)
        self.server.send_message([1, 1, 0])
        await self.assert_counted(2, 3, 0)
        await self.restart()
        self.server.history_size = 10
        self.server.send_message([0] * 12)
        await self.assert_counted(2, 13, 2)

    @test
    async def test_skip_what_they_have_counted(self) -> None:
        """Where a message overlaps with the position, only the rest of it is counted."""
        self.server.prepare = lambda handler: None  # type: ignore[assignment, method-assign]
        self.begin()
        await until(lambda: len(self.server.clients) == 2)
        self.server.send_message([1, 0, 1])
        await self.assert_counted(2, 3, 0)
        await self.drop()
        self.server.send_message([1, 1])
        await self.assert_counted(4, 5, 0)


class EventReader:
    """A connection to /events, read by hand: what a browser does, one step at a time."""

    def __init__(self, port: int, last: str = "") -> None:
        self.port = port
        self.last = f"Last-Event-ID: {last}\r\n" if last else ""
        self.text = ""

    async def connect(self) -> None:
        """Send the request."""
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(f"GET /events HTTP/1.1\r\nHost: localhost\r\n{self.last}\r\n".encode())

    async def read(self, pattern: str) -> re.Match[str]:
        """Read until the pattern matches, and return the match."""
        async with asyncio.timeout(TIMEOUT):
            while not (match := re.search(pattern, self.text, re.DOTALL)):
                data = await self.reader.read(65_536)
                assert data, self.text
                self.text += data.decode()
        return match

    async def event(self) -> tuple[str, dict[str, Any]]:
        """Return the id and the message of the next event."""
        match = await self.read(r"id: (\S+)\ndata: ([^\n]*)\n\n")
        self.text = self.text[match.end() :]
        return match[1], json.loads(match[2])

    async def close(self) -> None:
        """Go away."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


class EventsCase(RecipeCase):
    """A test whose own server also serves the recipe's EventStream."""

    def handlers(self) -> list[Any]:
        """Return the recipe's handler, over the log of this test's server."""
        self.save("events.py", readme_blocks(EVENTS, "python")[0])
        specification = importlib.util.spec_from_file_location("events", self.folder / "events.py")
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return [("/events", type("FreshEventStream", (module.EventStream, self.server), {}))]


class EventStreamTests(EventsCase):
    """The handler of the recipe "Server-Sent Events"."""

    def setUp(self) -> None:
        self.readers: list[EventReader] = []
        super().setUp()

    def tearDown(self) -> None:
        async def end() -> None:
            for reader in self.readers:
                await reader.close()

        self.io_loop.run_sync(end)
        super().tearDown()

    async def reader(self, last: str = "") -> EventReader:
        """Connect to /events, and wait for the headers of the answer."""
        reader = EventReader(self.port, last)
        self.readers.append(reader)
        await reader.connect()
        await reader.read("\r\n\r\n")
        return reader

    @test
    async def test_sends_the_log_of_the_websockets(self) -> None:
        """An event holds what a WebSocket message holds, and its id says what comes next."""
        self.server.send_message([1, 0])
        reader = await self.reader()
        self.assertIn("\r\nContent-Type: text/event-stream\r\n", reader.text)
        epoch = self.server.epoch
        expected = f"{epoch}:2", {"epoch": epoch, "offset": 0, "samples": [1, 0]}
        self.assertEqual(await reader.event(), expected)
        self.server.send_message([1])
        expected = f"{epoch}:3", {"epoch": epoch, "offset": 2, "samples": [1]}
        self.assertEqual(await reader.event(), expected)

    @test
    async def test_starts_exactly_at_the_last_event_id(self) -> None:
        """A client starts where Last-Event-ID says, or, with another epoch, at the oldest."""
        self.server.send_message([1, 0, 1])
        for last, offset in (f"{self.server.epoch}:1", 1), ("0badcafe:1", 0), ("no id", 0):
            identity, message = await (await self.reader(last)).event()
            self.assertEqual(identity, f"{self.server.epoch}:3")
            self.assertEqual(message["offset"], offset)
            self.assertEqual(message["samples"], [1, 0, 1][offset:])

    @test
    async def test_refuses_as_the_websocket_does(self) -> None:
        """An impossible offset is answered with 400, and one client too many with 503."""
        epoch = self.server.epoch
        for last in f"{epoch}:1", f"{epoch}:-1", f"{epoch}:1_0", f"{epoch}:", f"{epoch}:²":
            with self.assertLogs("tornado.access", "WARNING") as logged:
                self.assertRegex((await self.reader(last)).text, r"^HTTP/1.1 400 offset ")
            self.assertIn("400 GET /events", logged.output[0])
        self.server.max_clients = 0
        with self.assertLogs("tornado.access", "ERROR"):
            self.assertRegex((await self.reader()).text, r"^HTTP/1.1 503 too many clients")

    @test
    async def test_forgets_a_client_that_went_away(self) -> None:
        """Nothing remains of a client that goes away, and the others lose nothing by it."""
        going = await self.reader()
        await going.event()
        (client,) = self.server.clients
        gone = weakref.ref(client)
        del client
        staying = await self.reader()
        await staying.event()
        going.writer.transport.abort()
        sent = 0
        while sent < 10 or len(self.server.clients) == 2:
            self.server.send_message([sent])
            sent += 1
            await asyncio.sleep(0)
        received: list[int] = []
        while len(received) < sent:
            received += (await staying.event())[1]["samples"]
        self.assertEqual(received, list(range(sent)))
        await until(lambda: gc.collect() and False or gone() is None)

    @test
    async def test_keeps_one_unfinished_write_for_a_slow_client(self) -> None:
        """A client that does not read costs one write, and gets the rest as one event."""
        reader = await self.reader()
        await reader.event()
        (handler,) = self.server.clients
        sample = "x" * 100_000
        turns = 0
        while turns < 50:  # of the event loop without progress: the kernel takes no more
            if not handler.writing:
                self.server.send_message([sample])
                turns = 0
            await asyncio.sleep(0.005)
            turns += 1
        position = handler.position
        for _ in range(20):
            self.server.send_message([sample])
            await asyncio.sleep(0)
        self.assertEqual(handler.position, position)
        end, offset = self.server.end, 0
        while offset < end:
            identity, message = await reader.event()
            self.assertEqual(message["offset"], offset)
            self.assertEqual(message["samples"], [sample] * len(message["samples"]))
            offset += len(message["samples"])
            self.assertEqual(identity, f"{self.server.epoch}:{offset}")
        self.assertEqual(message["offset"], position)


@needs_chromium
class EventSourceTests(EventsCase, ChromiumCase):
    """The page of the recipe "Server-Sent Events", with the EventSource of a browser."""

    def handlers(self) -> list[Any]:
        """Return the events and the page."""
        return super().handlers() + ChromiumCase.handlers(self)

    def setUp(self) -> None:
        super().setUp()
        self.save_page(readme_blocks(EVENTS, "js")[0].rstrip())

    @test
    async def test_resumes_after_a_drop(self) -> None:
        """After a drop, the browser comes back with its position, and counts each sample once."""
        tab = await self.browse(self.page)
        values = random.Random(3)
        sent: list[int] = []
        for _ in range(3):
            samples = [values.getrandbits(30) for _ in range(4)]
            sent += samples
            self.server.send_message(samples)
            await tab.until(f"trials === {len(sent)}")
            await self.drop()
            position = len(sent)
            sent.append(7)
            self.server.send_message([7])
            await until(lambda: self.server.clients)
            (handler,) = self.server.clients
            last = handler.request.headers["Last-Event-ID"]
            self.assertEqual(last, f"{self.server.epoch}:{position}")
        await tab.until(f"trials === {len(sent)}")
        state = await tab.value("[ones, position, missed, epoch]")
        self.assertEqual(state, [sum(sent), len(sent), 0, self.server.epoch])

    @test
    async def test_says_what_it_missed(self) -> None:
        """What left the history while the page was away is missed, and the rest is counted."""
        self.server.history_size = 10
        tab = await self.browse(self.page)
        self.server.send_message([1, 0, 1])
        await tab.until("trials === 3")
        await self.drop()
        self.server.send_message([1] * 25)
        await tab.until("trials === 13")
        self.assertEqual(await tab.value("[ones, position, missed]"), [12, 28, 15])

    @test
    async def test_counts_a_restarted_server_too(self) -> None:
        """A new epoch counts from its beginning, less what had left, and earlier counts stay."""
        tab = await self.browse(self.page)
        self.server.send_message([1, 1, 0])
        await tab.until("trials === 3")
        await self.restart()
        self.server.history_size = 10
        self.server.send_message([0] * 12)
        await tab.until("trials === 13")
        state = await tab.value("[ones, position, missed, epoch]")
        self.assertEqual(state, [2, 12, 2, self.server.epoch])

    @test
    async def test_runs_as_it_stands(self) -> None:
        """The recipe's files serve a browser and a Python client the same samples."""
        port = free_port()
        self.forwarder.backends = (port,)
        # The port of the recipe is the reader's; the test takes a free one.
        self.save("page.py", readme_blocks(EVENTS, "python")[1], **{"8765": port})
        self.script("page")
        await until(lambda: accepts(port))
        client = Recorder(f"ws://127.0.0.1:{port}/websocket")
        self.follow(client)
        tab = await self.browse(self.page)
        await tab.until("trials > 5")
        self.forwarder.drop()
        await tab.until("trials > 30")
        ones, trials, position, missed = await tab.value("[ones, trials, position, missed]")
        await until(lambda: client.position >= position)
        self.assertEqual((trials, missed), (position, 0))
        self.assertEqual(ones, sum(client.samples[:position]))


@needs_nats_server
@needs("nats")
class MoreThanOneMachineTests(RecipeCase):
    """The recipe "More than one machine", with a real broker."""

    def setUp(self) -> None:
        super().setUp()
        self.broker_port = free_port()
        produce, feed, serve = readme_blocks(MACHINES, "python")
        # The broker's port of the recipe is the usual one; the test takes a free one.
        self.save("produce.py", produce, **{"4222": self.broker_port})
        self.save("feed.py", feed)
        self.save("serve.py", serve, **{"4222": self.broker_port})
        self.io_loop.run_sync(self.start_broker)

    async def start_broker(self) -> subprocess.Popen[bytes]:
        """Start the broker on this test's port, with a store of its own."""
        self.noisy.add("broker")  # it writes its log there
        store = self.folder / "store"
        options = "-js", "-a", "127.0.0.1", "-p", self.broker_port, "-sd", store
        broker = self.start("broker", NATS_SERVER, *options)
        await until(lambda: accepts(self.broker_port))
        return broker

    @contextlib.asynccontextmanager
    async def jetstream(self) -> AsyncIterator[Any]:
        """Connect to the broker."""
        import nats

        connection = await nats.connect(f"nats://127.0.0.1:{self.broker_port}")
        try:
            yield connection.jetstream()
        finally:
            await connection.close()

    async def samples(self) -> list[Any]:
        """Return every sample that the stream holds, from the broker itself."""
        async with self.jetstream() as jetstream:
            state = (await jetstream.stream_info("samples")).state
            numbers = range(state.first_seq, state.last_seq + 1)
            return [
                json.loads((await jetstream.get_msg("samples", number)).data) for number in numbers
            ]

    async def publish(self, samples: Iterable[int]) -> None:
        """Publish samples instead of the recipe's producer."""
        async with self.jetstream() as jetstream:
            await jetstream.add_stream(name="samples", max_msgs=10_000)
            for sample in samples:
                await jetstream.publish("samples", json.dumps(sample).encode())

    async def one_more(self) -> tuple[subprocess.Popen[bytes], int]:
        """Start one more server, and return its process and its port when it accepts clients."""
        port = free_port()
        process = self.script("serve", port)
        await until(lambda: accepts(port))
        return process, port

    @test
    async def test_moves_a_client_to_another_server(self) -> None:
        """When its server is killed, a client goes on at another: 0 lost, 0 double, same epoch."""
        self.script("produce")
        (first, port), (_, other) = await self.one_more(), await self.one_more()
        self.forwarder.backends = port, other
        client = Recorder(f"ws://127.0.0.1:{self.forwarder.port}/websocket")
        self.follow(client)
        await until(lambda: client.position >= 15)
        epoch = client.epoch
        first.kill()
        first.wait()
        reached = client.position
        await until(lambda: client.position >= reached + 15)
        self.assertEqual([server for server, _ in self.forwarder.requests][:1], [port])
        self.assertEqual([server for server, _ in self.forwarder.requests][-1:], [other])
        self.assertEqual((client.epoch, client.missed), (epoch, 0))
        received = list(client.samples)  # first, since more come while the truth is read
        truth = await self.samples()
        self.assertEqual(received, truth[: len(received)])
        # A server that is behind refuses the offset, and Tornado writes a line for it.
        self.noisy.add("serve")
        errors = (self.folder / "serve.err").read_text()
        self.assertRegex(errors, r"\A(400 GET /websocket\?.*\n)*\Z")

    @test
    async def test_has_the_history_before_it_lets_clients_in(self) -> None:
        """The first message of a server that has just started holds the whole stream."""
        values = random.Random(4)
        samples = [values.getrandbits(30) for _ in range(300)]
        await self.publish(samples)
        _, port = await self.one_more()
        connection = await websocket_connect(f"ws://127.0.0.1:{port}/websocket")
        frame = await connection.read_message()
        assert frame is not None
        message = json.loads(frame)
        connection.close()
        while await connection.read_message() is not None:
            pass
        self.assertEqual((message["offset"], message["samples"]), (0, samples))
        self.assertRegex(message["epoch"], r"^[0-9a-f]{8}$")

    @test
    async def test_keeps_offsets_when_the_stream_is_emptied(self) -> None:
        """With nothing left in the stream, a client that has it all goes on at its position."""
        await self.publish([1, 0, 1])
        first, port = await self.one_more()
        self.forwarder.backends = (port,)
        client = Recorder(f"ws://127.0.0.1:{self.forwarder.port}/websocket")
        self.follow(client)
        await until(lambda: client.position == 3)
        await self.kill(first, port)
        async with self.jetstream() as jetstream:
            await jetstream.purge_stream("samples")
        _, port = await self.one_more()
        self.forwarder.backends = (port,)
        await self.publish([7])
        await until(lambda: client.position == 4)
        self.assertEqual((client.samples, client.missed), ([1, 0, 1, 7], 0))

    @test
    async def test_says_what_the_stream_dropped(self) -> None:
        """What left the stream before a server could read it is missed, and the rest comes."""
        await self.publish([1, 0, 1])
        first, port = await self.one_more()
        self.forwarder.backends = (port,)
        client = Recorder(f"ws://127.0.0.1:{self.forwarder.port}/websocket")
        self.follow(client)
        await until(lambda: client.position == 3)
        await self.kill(first, port)
        await self.publish([1] * 9)
        async with self.jetstream() as jetstream:
            for number in 6, 7, 10:
                await jetstream.delete_msg("samples", number)
        _, port = await self.one_more()
        self.forwarder.backends = (port,)
        await until(lambda: client.position == 12)
        self.assertEqual((len(client.samples), client.missed), (5, 7))

    @test
    async def test_is_another_epoch_when_the_stream_is_made_anew(self) -> None:
        """Servers of the same stream have the same epoch; a stream made anew has another."""

        async def epoch() -> str:
            _, port = await self.one_more()
            client = Recorder(f"ws://127.0.0.1:{port}/websocket")
            task = self.follow(client)
            await until(lambda: client.epoch)
            task.cancel()
            return str(client.epoch)

        await self.publish([1])
        first = await epoch()
        self.assertEqual(await epoch(), first)
        async with self.jetstream() as jetstream:
            await jetstream.delete_stream("samples")
        await self.publish([1])
        self.assertNotEqual(await epoch(), first)

    @test
    async def test_goes_on_when_the_broker_comes_back(self) -> None:
        """A server and its clients outlive a broker that is restarted."""
        broker = self.processes[0]
        await self.publish([1, 0, 1])
        _, port = await self.one_more()
        client = Recorder(f"ws://127.0.0.1:{port}/websocket")
        self.follow(client)
        await until(lambda: client.position == 3)
        broker.terminate()
        broker.wait()
        self.noisy.add("serve")  # the client library logs the loss of the connection
        await self.start_broker()
        await self.publish([7, 8])
        await until_resumed(lambda: client.position == 5)
        self.assertEqual((client.samples, client.missed), ([1, 0, 1, 7, 8], 0))

    @test
    async def test_goes_on_when_its_consumer_is_lost(self) -> None:
        """A server whose consumer is lost makes another, which loses and doubles nothing."""
        await self.publish([1, 0, 1])
        _, port = await self.one_more()
        client = Recorder(f"ws://127.0.0.1:{port}/websocket")
        self.follow(client)
        await until(lambda: client.position == 3)
        async with self.jetstream() as jetstream:
            for consumer in await jetstream.consumers_info("samples"):
                await jetstream.delete_consumer("samples", consumer.name)
        await self.publish([7, 8])
        await until_resumed(lambda: client.position >= 5)
        self.assertEqual((client.samples, client.missed), ([1, 0, 1, 7, 8], 0))
