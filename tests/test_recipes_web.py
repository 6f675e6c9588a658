"""The recipes for browsers and for passing a stream on, with a real Chromium, nginx and NATS."""

import asyncio
import contextlib
import importlib
import re
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest import mock

from tornado.httpclient import AsyncHTTPClient
from tornado.iostream import IOStream
from tornado.web import Application

from server import WebSocketServer
from tests import support
from tests.faults import Proxy, raw_client
from tests.programs import RecipeCase, line_with, running
from tests.recipes import events, page
from tests.support import Recorder, following, needs, own_port, until, which


class WebCase(RecipeCase):
    make: Callable[[], Application] = staticmethod(page.make_page_app)

    async def asyncSetUp(self) -> None:
        self.url = await self.enterAsyncContext(support.serving(self.make()))
        self.stream = WebSocketServer.stream


@needs("playwright", "chromium")
class BrowserCase(WebCase):
    """A page in Chromium: `value` evaluates JavaScript, `wait_for` waits until it is true."""

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        playwright = importlib.import_module("playwright.async_api").async_playwright()
        chromium = (await self.enterAsyncContext(playwright)).chromium
        browser = await chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        self.page: Any = await browser.new_page()
        self.page.set_default_timeout(support.PATIENCE * 1000)
        self.value = self.page.evaluate
        self.wait_for = self.page.wait_for_function

    async def browse(self, url: str, path: str = "/") -> None:
        """Open a page, wait until it is live, and let it come back quickly."""
        await self.page.goto(url.replace("ws:", "http:").replace("/websocket", path))
        await self.wait_for("part('state').textContent === 'live' && client.epoch")
        await self.value("client.retryDelay = 0.01")

    async def counted(self, trials: int, ones: int, missed: int) -> None:
        """Check what the page shows, when it has drawn so many trials."""
        await self.wait_for(f"part('trials').textContent === '{trials}'")
        state = await self.value("[alpha - 1, alpha + beta - 2, part('missed').textContent]")
        self.assertEqual(state, [ones, trials, str(missed)])


class StreamScriptTests(BrowserCase):
    async def test_rule(self) -> None:
        """The callback sees where the stream goes on after its samples, by the rule of client.py."""
        await self.page.add_script_tag(path=page.HERE / "stream.js")
        await self.value("""() => {
            client = new StreamClient();
            client.onSamples = (samples) => {
                taken = [client.epoch, client.position, client.missed, ...samples];
            };
        }""")
        for epoch, offset, samples, taken in (
            ("a", 5, [1, 2], ["a", 7, 0, 1, 2]),  # what came before the first message is not missed
            ("a", 6, [2, 3], ["a", 8, 0, 3]),  # 6 comes twice
            ("a", 10, [4], ["a", 11, 2, 4]),  # 8 and 9 are missed
            ("b", 0, [5], ["b", 1, 2, 5]),
            ("b", 3, [6], ["b", 4, 4, 6]),
        ):
            message = {"epoch": epoch, "offset": offset, "samples": samples}
            await self.value("message => client.take(JSON.stringify(message))", message)
            self.assertEqual(await self.value("taken"), taken)

    async def test_names(self) -> None:
        """A page may have names of its own that the script uses inside."""
        await self.page.add_script_tag(content="const limit = 300, take = 1, epoch = 2, missed = 3")
        await self.page.add_script_tag(path=page.HERE / "stream.js")
        self.assertEqual(await self.value("typeof StreamClient"), "function")


class PageTests(BrowserCase):
    path_behind_nginx = "/app/"

    async def test_posterior(self) -> None:
        """The 95 % interval is that of Beta(1, 1), then of Beta(2, 1); the mean that of Beta(6, 4)."""
        await self.browse(self.url)
        await self.wait_for("part('interval').textContent === '0.025 – 0.975'")
        self.stream.append([1])
        await self.wait_for("part('interval').textContent === '0.158 – 0.987'")
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
            await proxy.drop()
            self.stream.append([0, 0, 1])
            await self.counted(7, 4, 0)
            await proxy.drop()
            self.stream.append([1] * 25)
            await self.counted(17, 14, 15)

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

    @needs("nginx")
    async def test_nginx(self) -> None:
        """Behind nginx, the page follows the stream, under a path with the lines of page.py."""
        address, port = self.url.split("/")[2], self.enterContext(own_port())
        (location,) = re.findall(r"location .*?\n    }", page.__doc__ or "", re.DOTALL)
        location = location.replace("localhost:8765", address)
        places = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        paths = "".join(f"{place}_temp_path {self.folder}/{place};" for place in places)
        (self.folder / "nginx.conf").write_text(f"""
            daemon off; master_process off; pid pid; events {{}}
            http {{
                access_log off; {paths}
                server {{
                    listen 127.0.0.1:{port};
                    location / {{ proxy_pass http://{address}; }}
                    {location}
                }}
            }}""")
        options = ["-p", str(self.folder), "-c", "nginx.conf", "-e", "errors"]
        with running(str(which("nginx")), *options, python=False), socket.socket() as probe:
            await until(lambda: probe.connect_ex(("127.0.0.1", port)) == 0)
            await self.browse(support.url_at(port), self.path_behind_nginx)
            self.stream.append([1, 0, 1])
            await self.counted(3, 2, 0)


class EventsPageTests(PageTests):  # which promises the same when it follows events
    make = staticmethod(events.make_events_app)
    path_behind_nginx = "/"  # the lines of page.py are for its path


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


class RelayTests(RecipeCase):
    async def test_restart(self) -> None:
        """The posterior is a stream and a page, and survives a restart of the first server."""
        with self.recipe("relay", "--url", self.url, "--port=0") as server:
            results = Recorder(await self.url_of(server))
            async with following(results):
                await until(lambda: self.handler.clients)
                self.stream.append([1, 1, 0])
                await until(lambda: results.samples)
                await self.restart()
                self.stream.append([1])
                await until(lambda: len(results.samples) == 2)
            address = results.url.replace("ws:", "http:").removesuffix("websocket")
            shown = (await AsyncHTTPClient().fetch(address)).body
            self.assertIn(b"Beta(4, 2)  mean 0.6667  sd 0.1782  missed 0", shown)
            await self.interrupt(server)
        self.assertEqual([sample["trials"] for sample in results.samples], [3, 4])


@needs("nats", "nats-server")
class BrokerTests(RecipeCase):
    async def asyncSetUp(self) -> None:
        options = ["-js", "-a", "127.0.0.1", "-p", "-1", "-sd", str(self.folder)]
        server = running(str(which("nats-server")), *options, python=False)
        broker = self.enterContext(server)
        address = f"nats://{line_with(broker, 'Listening for client').split()[-1]}"
        line_with(broker, "Server is ready")
        self.broker = "broker", "--broker", address
        connect: Any = importlib.import_module("nats").connect
        self.jetstream = (await self.enterAsyncContext(await connect(address))).jetstream()

    async def publish(self, *numbers: int) -> None:
        """Publish samples, as the producer does."""
        for number in numbers:
            await self.jetstream.publish("samples", b"%d" % number)

    async def test_killed_server(self) -> None:
        """When a server is killed, its client goes on at another, which has the same log."""
        with (
            self.recipe(*self.broker, "produce") as producer,
            self.recipe(*self.broker, "serve", "--port=0") as first,
            self.recipe(*self.broker, "serve", "--port=0") as second,
        ):
            client, other = Recorder(await self.url_of(first)), Recorder(await self.url_of(second))
            async with following(client):
                await until(lambda: client.position >= 10)
                first.kill()
                reached, client.url = client.position, other.url  # as a proxy would send it there
                await until(lambda: client.position >= reached + 10)
            async with following(other):
                await until(lambda: other.position > client.position)
            await self.interrupt(producer)
            await self.interrupt(second)
        self.assertEqual(client.samples, other.samples[: client.position])
        self.assertEqual((client.epoch, client.missed), (other.epoch, 0))

    async def test_log_with_holes(self) -> None:
        """What the broker has dropped is missed, what is not JSON is null; a new stream is the end."""
        with self.recipe(*self.broker, "serve", "--port=0") as server:
            client = Recorder(await self.url_of(server))
            async with following(client):
                await self.publish(0, 1, 2)
                await until(lambda: client.position == 3)
                # Without its consumer, the server gets nothing until the library makes a new one,
                # after some 20 s. By then, only samples 6 and 7 are left.
                for consumer in await self.jetstream.consumers_info("samples"):
                    await self.jetstream.delete_consumer("samples", consumer.name)
                await self.publish(3, 4, 5, 6)
                await self.jetstream.publish("samples", b"{")
                await self.jetstream.purge_stream("samples", keep=2)
                await until(lambda: client.position == 8)
            self.assertEqual((client.samples, client.missed), ([0, 1, 2, 6, None], 3))
            # After 5 s without a sample, the server sees that the stream is another one, and ends.
            await self.jetstream.delete_stream("samples")
            await self.jetstream.add_stream(name="samples")
            log = await self.ends(server, status=1)
        self.assertRegex(log, r" sample 7 is sent as null(.*\n)+the stream was made anew: .*\n\Z")
