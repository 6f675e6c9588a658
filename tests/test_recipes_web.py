"""The recipes for browsers and for passing a stream on, with a real Chromium, nginx and NATS."""

import asyncio
import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import socket
import unittest
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest import mock

from tornado.httpclient import AsyncHTTPClient
from tornado.iostream import IOStream
from tornado.web import Application

from client import BetaBinomial
from server import WebSocketServer
from tests import support
from tests import test_recipes_sources as sources
from tests.faults import Proxy, raw_client
from tests.recipes import events, page, relay
from tests.support import Recorder, following, line_with, running, serving, until, url_of
from tests.test_recipes_sources import recipe


def which(program: str) -> str:
    """Find a program, also where Debian has daemons; otherwise return an empty text."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


def needs(module: str, program: str) -> Callable[[Any], Any]:
    """Skip tests where a module or a program is missing."""
    there = importlib.util.find_spec(module) and which(program)
    return unittest.skipUnless(there, f"needs {module} and {program}: see tests/requirements.txt")


class ProgramTests(sources.ProgramTests):
    def servers(self) -> list[list[Any]]:
        """Return the command of each recipe that serves."""
        return [["page"], ["events"], ["relay"]]


class WebCase(sources.RecipeCase):
    make: Callable[[], Application] = staticmethod(page.make_page_app)

    async def asyncSetUp(self) -> None:
        self.url = await self.enterAsyncContext(serving(self.make()))
        self.stream = WebSocketServer.stream


@needs("playwright", "chromium")
class BrowserCase(WebCase):
    page: Any
    value: Any  # evaluates JavaScript in the page
    shows: Any  # waits until JavaScript is true

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        playwright = importlib.import_module("playwright.async_api").async_playwright()
        chromium = (await self.enterAsyncContext(playwright)).chromium
        browser = await chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        self.page = await browser.new_page()
        self.page.set_default_timeout(support.PATIENCE * 1000)
        self.value, self.shows = self.page.evaluate, self.page.wait_for_function

    async def browse(self, url: str, path: str = "/") -> None:
        """Open a page, wait until it is live, and let it come back quickly."""
        await self.page.goto(url.replace("ws:", "http:").replace("/websocket", path))
        await self.shows("part('state').textContent === 'live' && client.epoch")
        await self.value("client.retryDelay = 0.01")

    async def counted(self, trials: int, ones: int, missed: int) -> None:
        """Check what the page shows, when it has drawn so many trials."""
        await self.shows(f"part('trials').textContent === '{trials}'")
        state = await self.value("[alpha - 1, alpha + beta - 2, part('missed').textContent]")
        self.assertEqual(state, [ones, trials, str(missed)])


class StreamScriptTests(BrowserCase):
    async def test_rule(self) -> None:
        """The callback sees where the stream goes on after its samples, by the rule of client.py.

        At 5 begins what came first; 6 comes twice; 8 and 9 are missed, as are 1 and 2 of run b.
        """
        await self.page.add_script_tag(path=page.HERE / "stream.js")
        script = """messages => {
            const c = new StreamClient(), taken = [];
            c.onSamples = (samples) => taken.push([c.epoch, c.position, c.missed, ...samples]);
            for (const [epoch, offset, samples] of messages)
                c.take(JSON.stringify({epoch, offset, samples}));
            return taken;
        }"""
        messages = ("a", 5, [1, 2]), ("a", 6, [2, 3]), ("a", 10, [4]), ("b", 0, [5]), ("b", 3, [6])
        taken = await self.value(script, messages)
        run_a = [["a", 7, 0, 1, 2], ["a", 8, 0, 3], ["a", 11, 2, 4]]
        self.assertEqual(taken, [*run_a, ["b", 1, 2, 5], ["b", 4, 4, 6]])

    async def test_names(self) -> None:
        """A page may have all names but one for itself."""
        await self.page.add_script_tag(content="const limit = 300, take = 1, epoch = 2, missed = 3")
        await self.page.add_script_tag(path=page.HERE / "stream.js")
        self.assertEqual(await self.value("typeof StreamClient"), "function")


class PageTests(BrowserCase):
    path_behind_nginx = "/app/"

    async def test_posterior(self) -> None:
        """The 95 % interval is that of Beta(1, 1), then of Beta(2, 1); the mean that of Beta(6, 4)."""
        await self.browse(self.url)
        await self.shows("part('interval').textContent === '0.025 – 0.975'")
        self.stream.append([1])
        await self.shows("part('interval').textContent === '0.158 – 0.987'")
        self.stream.append([1, 1, 0, 1, 0, 0, 1])
        await self.counted(8, 5, 0)
        self.assertEqual(await self.value("part('mean').textContent"), "0.6000")

    async def test_drop(self) -> None:
        """After a drop the page goes on where it was, and says what it has missed."""
        self.stream.history_size = 10
        async with contextlib.aclosing(Proxy(self.url)) as proxy:
            await self.browse(proxy.url)
            self.stream.append([1, 0, 1, 1])
            await self.counted(4, 3, 0)
            for samples, counts in ([0, 0, 1], (7, 4, 0)), ([1] * 25, (17, 14, 15)):
                await proxy.close()
                self.stream.append(samples)
                await self.counted(*counts)

    async def test_callback_that_throws(self) -> None:
        """What the model refuses comes again, after waits that double, and is counted once."""
        await self.browse(self.url)
        await self.value("""() => {
            states = [];
            client.onState = (text) => { if (/next try/.test(text)) states.push(text); };
            [client.retryDelay, Math.random] = [0.1, () => 1];
            const count = client.onSamples;
            client.onSamples = (samples) => { if (states.length < 3) throw "no"; count(samples); };
        }""")
        self.stream.append([1, 0, 1])
        await self.counted(3, 2, 0)
        expected = [f"no; next try in {wait} s" for wait in (0.1, 0.2, 0.4)]
        self.assertEqual(await self.value("states"), expected)

    @needs("playwright", "nginx")
    async def test_nginx(self) -> None:
        """Behind nginx, the page follows the stream, under a path with the lines of page.py."""
        (location,) = re.findall(r"location .*?\n    }", page.__doc__ or "", re.DOTALL)
        address, port = self.url.split("/")[2], support.free_port()
        parts = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        (self.folder / "nginx.conf").write_text(
            "daemon off; master_process off; pid pid; events {} http { access_log off;"
            + "".join(f"{part}_temp_path {self.folder}/{part};" for part in parts)
            + f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{address}; }}"
            + f"{location.replace('localhost:8765', address)} }} }}"
        )
        options = ["-p", str(self.folder), "-c", "nginx.conf", "-e", "errors"]
        with running(which("nginx"), *options, python=False), socket.socket() as probe:
            await until(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
            await self.browse(f"ws://127.0.0.1:{port}/websocket", self.path_behind_nginx)
            self.stream.append([1, 0, 1])
            await self.counted(3, 2, 0)


class EventsPageTests(PageTests):  # which promises the same when it follows events
    make = staticmethod(events.make_events_app)
    path_behind_nginx = "/"  # which has no lines for it


class EventsTests(WebCase):
    make = staticmethod(events.make_events_app)

    @contextlib.asynccontextmanager
    async def client(self, header: str = "") -> AsyncIterator[IOStream]:
        """Ask for events, perhaps with one more header line."""
        data = f"GET /events HTTP/1.1\r\nHost: localhost\r\n{header}\r\n".encode()
        async with asyncio.timeout(support.PATIENCE), raw_client(self.url, data) as peer:
            yield peer

    async def test_id(self) -> None:
        """The id of an event is the position after it, and Last-Event-ID starts exactly there."""
        self.stream.message_size = 1
        self.stream.append([1, 0, 1])
        epoch = self.stream.epoch
        async with self.client(f"Last-Event-ID: {epoch}:1\r\n") as peer:
            text = (await peer.read_until(b"}\n\n")).decode()
        data = f'{{"epoch": "{epoch}", "offset": 1, "samples": [0]}}'
        self.assertIn(f"id: {epoch}:2\ndata: {data}\n\n", text)

    async def test_silence(self) -> None:
        """While there is no sample, empty messages say that the server is still there."""
        self.enterContext(mock.patch.object(events.Events, "silence", 0.01))
        async with self.client() as peer:
            await peer.read_until_regex(rb'(?s)("offset": 0, "samples": \[\].*){3}')

    async def test_slow_reader(self) -> None:
        """A client that does not read costs one write, and is brought up to date when it reads."""
        async with self.client() as peer:
            await until(lambda: events.Events.clients)
            (client,) = events.Events.clients
            self.stream.append(["x" * 100_000] * 200)
            await until(lambda: client.position)
            for _ in range(1000):
                await asyncio.sleep(0)  # many turns of the event loop
            self.assertLess(client.position, 200)
            await peer.read_until(f"id: {self.stream.epoch}:200\n".encode())
        await until(lambda: not events.Events.clients)

    async def test_too_many(self) -> None:
        """More clients than a process can have are refused."""
        self.enterContext(mock.patch.object(events.Events, "max_clients", 0))
        async with self.client() as peer:
            self.assertIn(b" 503 too many clients", await peer.read_until(b"\r\n"))


class RelayTests(support.ServedCase, sources.RecipeCase):
    async def test_restart(self) -> None:
        """The posterior is a stream and a page, and survives a restart of the first server."""
        with recipe("relay", "--url", self.url, "--port", 0) as process:
            results = Recorder(url_of(process))
            async with following(results):
                await until(lambda: WebSocketServer.clients)
                self.stream.append([1, 1, 0])
                await until(lambda: results.samples)
                await self.restart()
                self.stream.append([1])
                await until(lambda: len(results.samples) == 2)
            address = results.url.replace("ws:", "http:").removesuffix("websocket")
            shown = (await AsyncHTTPClient().fetch(address)).body
            self.assertIn(b"Beta(4, 2)  mean 0.6667  sd 0.1782  missed 0", shown)
            self.interrupt(process)
        self.assertEqual([sample["trials"] for sample in results.samples], [3, 4])

    async def test_result_that_is_no_json(self) -> None:
        """A result that cannot be sent changes nothing: no sample is counted twice."""
        client = relay.Relay(self.url)
        with mock.patch.object(relay, "summary", return_value={1}), self.assertRaises(TypeError):
            client.on_message([1, 1, 0])
        self.assertEqual(client.posterior, BetaBinomial())


@needs("nats", "nats-server")
class BrokerTests(sources.RecipeCase):
    async def asyncSetUp(self) -> None:
        options = ["-js", "-a", "127.0.0.1", "-p", "-1", "-sd", str(self.folder)]
        broker = self.enterContext(running(which("nats-server"), *options, python=False))
        self.broker = f"nats://{line_with(broker, 'Listening for client').split()[-1]}"
        line_with(broker, "Server is ready")
        connect: Any = importlib.import_module("nats").connect
        self.jetstream = (await self.enterAsyncContext(await connect(self.broker))).jetstream()

    def run_role(self, *role: object) -> Any:
        """Run the recipe with this broker."""
        return self.enterContext(recipe("broker", "--broker", self.broker, *role))

    async def test_killed_server(self) -> None:
        """When a server is killed, its client goes on at another, which has the same log."""
        producer = self.run_role("produce")
        first, second = self.run_role("serve", "--port=0"), self.run_role("serve", "--port=0")
        client, other = Recorder(url_of(first)), Recorder(url_of(second))
        async with following(client):
            await until(lambda: client.position >= 10)
            first.kill()
            reached, client.url = client.position, other.url  # as a proxy would send it there
            await until(lambda: client.position >= reached + 10)
        async with following(other):
            await until(lambda: other.position > client.position)
        self.assertEqual(client.samples, other.samples[: client.position])
        self.assertEqual((client.epoch, client.missed), (other.epoch, 0))
        self.interrupt(producer)
        self.interrupt(second)

    async def test_log_with_holes(self) -> None:
        """What the broker has dropped is missed, what is no JSON is null; a new stream is the end."""
        process = self.run_role("serve", "--port=0")
        client = Recorder(url_of(process))
        async with following(client):
            for number in range(5):
                await self.jetstream.publish("samples", b"%d" % number)
            await until(lambda: client.position == 5)
            for consumer in await self.jetstream.consumers_info("samples"):  # the server's
                await self.jetstream.delete_consumer("samples", consumer.name)
            for text in *(b"%d" % number for number in range(5, 20)), b"{":
                await self.jetstream.publish("samples", text)
            await self.jetstream.purge_stream("samples", keep=3)
            await until(lambda: client.position == 21)  # the server notices after some 20 s
        self.assertEqual((client.samples, client.missed), ([*range(5), 18, 19, None], 13))
        await self.jetstream.delete_stream("samples")
        await self.jetstream.add_stream(name="samples")
        log = process.communicate(timeout=support.PATIENCE)[1]
        self.assertRegex(log, r" sample 20 is sent as null(.*\n)+the stream was made anew: .*\n\Z")
        self.assertEqual(process.returncode, 1)

    def test_impossible_broker(self) -> None:
        """What cannot be a broker is one line and status 1."""
        self.ends(1, "broker: .*\n", "broker", "--broker", "nats://localhost:99999", "produce")
