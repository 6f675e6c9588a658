"""The recipes that are sources or servers: what each of them promises, alone and as a program."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import tempfile
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.websocket import websocket_connect

from server import WebSocketServer, make_app
from tests import support
from tests.recipes import blocking_source, embedded, finite, growing_file, numbered_source
from tests.support import Recorder, following, line_with, running, serving, until, url_of


def recipe(name: str, *options: object) -> contextlib.AbstractContextManager[Any]:
    """Run a recipe as a program."""
    left = "ignore:unclosed <socket:ResourceWarning"  # by Tornado, when a port is taken
    return running("-W", left, "-m", f"tests.recipes.{name}", *map(str, options))


class RecipeCase(support.QuietCase):
    """A test with a file in a folder of its own, and with what is secret in the environment."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "a#b & c.csv"
        self.path.write_text("price\n10\n")
        self.enterContext(mock.patch.dict(os.environ, {"KEY": "k", "TOKEN": "t0ken"}))

    def ends(self, status: int, log: str, *command: Any) -> None:
        """Run a recipe that ends by itself, and check its status and its log."""
        with self.subTest(command), recipe(*command) as process:
            self.assertRegex(process.communicate(timeout=support.PATIENCE)[1], rf"\A{log}\Z")
            self.assertEqual(process.returncode, status)

    def interrupt(self, process: Any, status: int = 0) -> None:
        """Press Ctrl-C, and check that a program ends quietly, and has logged no token."""
        process.send_signal(signal.SIGINT)
        self.assertNotRegex(process.communicate(timeout=support.PATIENCE)[1], "Traceback|t0ken")
        self.assertEqual(process.returncode, status)


class ProgramTests(RecipeCase):
    def servers(self) -> list[list[Any]]:
        """Return the command of each recipe that serves."""
        roles = [["listening", "server"], ["finite", "server"], ["embedded"], ["blocking_source"]]
        return [*roles, ["growing_file", self.path], ["numbered_source", self.path, "price"]]

    def test_copy(self) -> None:
        """A copy beside the scripts serves at a free port, and ends quietly at Ctrl-C."""
        for file in *support.ROOT.glob("*.py"), *support.ROOT.glob("tests/recipes/*.py"):
            shutil.copy(file, self.folder)
        for name, *options in self.servers():
            program = str(self.folder / f"{name}.py")
            with self.subTest(name), running(program, *map(str, options), "--port", "0") as process:
                url_of(process)
                self.interrupt(process)

    def test_port_that_cannot_be_served(self) -> None:
        """A taken port is one line and status 1, an impossible one is a wrong option."""
        with socket.create_server(("localhost", 0)) as taken:
            port = taken.getsockname()[1]
            for command in self.servers():
                self.ends(1, f"cannot serve on localhost:{port}: .*\n", *command, "--port", port)
                self.ends(2, "usage: (.*\n)+.*error: .*port.* 65535.*\n", *command, "--port=65536")


class GrowingFileTests(RecipeCase):
    def append(self, data: bytes) -> None:
        """Write to the end of the file."""
        with self.path.open("ab") as file:
            file.write(data)

    async def test_lines_become_samples(self) -> None:
        """A line that is appended is a sample, one that was there before is none."""
        with recipe("growing_file", self.path, "--port", 0) as process:
            client = Recorder(url_of(process))
            async with following(client):
                self.append(b"1\r\n\n\xff\n")
                await until(lambda: client.samples == ["1", "", "\ufffd"], lambda: client.samples)

    def test_half_a_line_waits(self) -> None:
        """A line in pieces is one sample; a truncated file is read from its new start."""
        self.append(b"sec")
        with contextlib.closing(growing_file.new_lines(self.path)) as lines:
            self.assertEqual(next(lines), ["price", "10"])
            self.append(b"on")
            self.assertEqual(next(lines), [])
            self.append(b"d\r\n\nthird\nhalf")
            self.assertEqual(next(lines), ["second", "", "third"])
            self.path.write_bytes(b"new\n")
            self.assertEqual(next(lines), ["new"])

    def test_missing_and_replaced(self) -> None:
        """A file may come later; when it is renamed, it is read to its end, then the new one."""
        renamed = self.folder / "renamed"
        self.path.unlink()
        with contextlib.closing(growing_file.new_lines(self.path)) as lines:
            self.assertEqual(next(lines), [])
            self.append(b"first\n")
            self.assertEqual(next(lines), ["first"])
            self.path.rename(renamed)
            self.assertEqual(next(lines), [])
            self.path.touch()  # the writer has not opened it yet
            self.assertEqual(next(lines), [])
            renamed.write_bytes(b"first\nlast\nhalf a li")
            self.append(b"a much longer first line\n")
            self.assertEqual([*next(lines), *next(lines)], ["last", "a much longer first line"])


class NumberedSourceTests(RecipeCase):
    async def test_kills(self) -> None:
        """While the server is killed in mid-file again and again, a client gets each row once."""
        rows = [None if number % 50 == 7 else number for number in range(400)]
        self.path.write_text("\n".join(["day,price", *(f"x,{row}" for row in rows)]))
        port = support.free_port()
        client, late = (Recorder(f"ws://localhost:{port}/websocket") for _ in range(2))
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(following(client))
            for goal in 30, 130, 230, 400:
                with recipe("numbered_source", self.path, "price", "--interval=2", "--port", port):
                    await until(lambda: client.position >= goal)  # noqa: B023
                    if goal == 400:
                        await stack.enter_async_context(following(late))
                        await until(lambda: late.position == 400)
        self.assertEqual((client.samples, client.missed, late.samples), (rows, 0, rows))
        self.assertRegex(client.epoch or "", "^[0-9a-f]{8}$")  # whatever the file's name is

    def test_bad_rows(self) -> None:
        """A row without a number is None and one line, and the others keep their numbers."""
        bad = ["", "b", "b,", "b,x", "b,inf", "b,nan", "b,\ufffd", f"{'b' * 140_000},1", '"b\n,2",']
        for row in bad:
            lines = f'day,price\r\na,1\r\n{row}\r\n"c\r\n",3\r\n'.splitlines(keepends=True)
            with self.subTest(row[:20]), self.assertLogs("source") as logged:
                self.assertEqual([*numbered_source.read(lines, "price")], [1, None, 3])
                self.assertRegex("\n".join(logged.output), r"\A.*row 1 is sent as null.*\Z")

    def test_several_columns(self) -> None:
        """Another `read_row` makes a sample of several columns, and the same rows are bad."""
        quote = lambda row, column: [row["symbol"], float(row[column])]
        lines = ["symbol,price", "ACME,10", "ACME,"]
        with mock.patch.object(numbered_source, "read_row", quote), self.assertLogs("source"):
            self.assertEqual([*numbered_source.read(lines, "price")], [["ACME", 10], None])

    async def test_count_is_saved_first(self) -> None:
        """The count of rows is in its file before a row is sent: no client knows more."""
        seen, count_file = [], self.folder / "count"
        note = lambda samples: seen.append((samples, count_file.read_text()))
        with mock.patch.object(numbered_source.Rows, "send_message", note):
            await numbered_source.play(iter([13, 14]), 3, count_file, 0)
        self.assertEqual(seen, [([13], "4"), ([14], "5")])

    async def test_client_that_is_ahead(self) -> None:
        """One who comes with more rows than were sent is told what may have happened."""
        async with serving(make_app(numbered_source.Rows)) as url:
            with self.assertRaisesRegex(HTTPClientError, "400: .*if the count file was deleted"):
                await websocket_connect(f"{url}?epoch={numbered_source.Rows.stream.epoch}&offset=9")

    def test_refusals(self) -> None:
        """A column that is not there, and a count that cannot be, are refused."""
        reason = "no column 'prise' in|must hold a count, not 'x'|only 1 now"
        for column, count in ("prise", "0"), ("price", "x"), ("price", "2"):
            (self.folder / f"{self.path.name}.count").write_text(count)
            self.ends(2, f"usage: (.*\n)+.*({reason}).*\n", "numbered_source", self.path, column)


class BlockingSourceTests(RecipeCase):
    async def test_pace(self) -> None:
        """Readings begin with a second; a failed one costs a minute more, a refused sample none."""
        make_app()
        source = mock.Mock(side_effect=[1.5, float("nan"), TimeoutError("silent"), 2.5, SystemExit])
        clock = mock.Mock(**{"perf_counter.side_effect": [0.25, 1.5, 3.75, 65.5, 66]})
        self.enterContext(mock.patch.object(blocking_source, "time", clock))
        with self.assertLogs("source") as logged, contextlib.suppress(SystemExit):
            blocking_source.follow(source, interval=1, pause=60)
        slept = [call.args[0] for call in clock.sleep.call_args_list]
        self.assertEqual(slept, [0.75, 0.5, 0.25, 60, 0.5, 1])
        self.assertRegex("\n".join(logged.output), r"\A.*nan.*\n.*TimeoutError\('silent'\).*\Z")
        await asyncio.sleep(0)
        self.assertEqual(WebSocketServer.stream.history, ["1.5", "2.5"])

    async def test_end_of_the_server(self) -> None:
        """The thread ends without a word when the server has ended."""
        make_app()
        WebSocketServer.stream.loop = asyncio.new_event_loop()
        WebSocketServer.stream.loop.close()
        blocking_source.follow(lambda: 1, interval=0.001)

    def test_reading_that_hangs(self) -> None:
        """Ctrl-C does not wait for a reading."""
        change = "import server, threading; from tests.recipes import blocking_source as recipe\n"
        change += "def measure(): server.logger.info('reads'); threading.Event().wait()\n"
        change += "recipe.measure = measure; server.run(recipe.main())"
        with running("-c", change, "--port", "0") as process:
            line_with(process, "reads")
            self.interrupt(process)


class ListeningTests(RecipeCase):
    async def test_server(self) -> None:
        """A message that is wrong is refused with a code that says how."""
        wrong: Any = (b"k 1", 1003), ("", 1008), ("\u043a 1", 1008), ("k nan", 1007)
        with recipe("listening", "server", "--port", 0) as server:
            url = url_of(server)
            for message, code in wrong:
                connection = await websocket_connect(url)
                await connection.write_message(message, isinstance(message, bytes))
                while await connection.read_message() is not None:
                    pass
                connection.close()
                self.assertEqual(connection.close_code, code, message)

    async def test_both_programs(self) -> None:
        """Who knows the key sets p for all, and who does not is told so."""
        with recipe("listening", "server", "--port", 0) as server:
            follower = Recorder(url := url_of(server))
            self.ends(0, "", "listening", "client", 0, "--url", url)
            os.environ["KEY"] = "guess"
            self.ends(1, "refused: 1008 wrong key\n", "listening", "client", 1, "--url", url)
            async with following(follower):  # by chance, that would be once in 10 ** 11 times
                await until(lambda: follower.samples[-20:] == [0] * 20)


@unittest.skipUnless(importlib.util.find_spec("trustme"), "needs trustme")
class PrivateTests(RecipeCase):
    async def test_both_programs(self) -> None:
        """Only who has the token gets the stream, and neither side logs it."""
        authority = importlib.import_module("trustme").CA()
        authority.cert_pem.write_to_path(ca := str(self.folder / "ca"))
        issued = authority.issue_cert("localhost").private_key_and_cert_chain_pem
        issued.write_to_path(own := str(self.folder / "own"))
        with recipe("private", "server", own, own, "--port", 0) as server:
            self.assertRegex(url := url_of(server), "^wss://")
            for header in "", "t0ken", "Bearer t0kenx", "Bearer t0ken\u00e9":
                request = HTTPRequest(url, headers={"Authorization": header}, ca_certs=ca)
                with self.subTest(header), self.assertRaisesRegex(HTTPClientError, "401: .* token"):
                    await websocket_connect(request)
            with recipe("private", "client", ca, url) as client:
                line_with(client, "connected")
                self.interrupt(client)
            self.interrupt(server)
        self.ends(2, "(.*\n)+.*must begin with wss://.*\n", "private", "client", ca, "ws://x")


class FiniteTests(RecipeCase):
    async def test_slow_client(self) -> None:
        """One who comes late gets all, and the server waits for one who is slow, too."""
        results, port = [f"{number:01000}" for number in range(12_000)], support.free_port()
        with mock.patch.object(finite, "compute") as compute:
            compute.return_value.__aiter__.return_value = results
            task = asyncio.create_task(finite.serve_results(0, 3600, port))
            await until(lambda: finite.Results.stream.end == 12_001)
        with socket.create_connection(("localhost", port)) as slow:
            slow.send(support.HANDSHAKE)  # it does not read
            await until(lambda: finite.Results.clients)
            client = finite.Collector(f"ws://localhost:{port}/websocket")
            await client.run()
            self.assertEqual((client.results, client.complete), (results, True))
            self.assertFalse((await asyncio.wait([task], timeout=0.3))[0])
        await asyncio.wait_for(task, support.PATIENCE)

    def test_restart(self) -> None:
        """A client begins anew with the server, and notices if it lacks something."""
        client = finite.Collector("ws://localhost/websocket")
        for epoch, samples in ("first", [2, 3]), ("second", [5, {"results": 2}]):
            client.epoch = epoch
            client.on_message(samples)
        self.assertEqual((client.results, client.complete), ([5], False))

    def test_both_programs(self) -> None:
        """A client shows a summary, and both end; one that is stopped before ends with status 1."""
        with recipe("finite", "server", "--below", 100, "--port", 0) as server:
            url = url_of(server)
            with recipe("finite", "client", "--url", url) as client:
                self.assertRegex(client.communicate()[0], "\n25 primes complete, the last is 97\n$")
                self.assertEqual((client.returncode, server.wait()), (0, 0))
        with recipe("finite", "client", "--url", url) as client:
            line_with(client, "cannot connect")
            self.interrupt(client, 1)
        self.ends(0, ".* serving .*\n", "finite", "server", "--below=9", "--wait=0", "--port=0")


class EmbeddedTests(support.ServedCase):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.statistics = embedded.Statistics(self.url, 0.01)
        self.app = embedded.make_application(self.statistics, "pass", "secret")
        self.own = await self.enterAsyncContext(serving(self.app))

    async def fetch(self, path: str, cookie: str = "", **options: Any) -> HTTPResponse:
        """Ask the application for a page."""
        url = self.own.replace("ws:", "http:").replace("/websocket", path)
        options |= {"headers": {"Cookie": cookie}, "follow_redirects": False}
        return await AsyncHTTPClient().fetch(url, raise_error=False, **options)

    async def test_strangers(self) -> None:
        """Without a login there are no pages and no stream, but a health check."""
        for path, status in ("/", 302), ("/statistics", 302), ("/health", 200), ("/websocket", 403):
            self.assertEqual((await self.fetch(path, "user=me")).code, status)
        wrong = await self.fetch("/login", method="POST", body="password=guess")
        self.assertEqual((wrong.code, wrong.headers.get("Set-Cookie")), (403, None))

    async def test_members(self) -> None:
        """A member gets the page, the statistics of the other stream, and its samples."""
        login = await self.fetch("/login", method="POST", body="password=pass")
        cookie = login.headers["Set-Cookie"].partition(";")[0]
        member = Recorder(self.own)
        request = lambda url: HTTPRequest(url, headers={"Cookie": cookie})
        self.enterContext(mock.patch.object(member, "request", request))
        async with following(self.statistics, member):
            self.handler.send_message([1, 1, 0])
            await until(lambda: member.samples == [1, 1, 0])
        statistics = await self.fetch("/statistics", cookie)
        self.assertIn(b'{"trials": 3, "mean": 0.6, ', statistics.body)
        self.assertEqual((await self.fetch("/", cookie)).code, 200)

    async def test_settings(self) -> None:
        """The application has all settings that make_app makes."""
        self.assertLessEqual(make_app(self.handler).settings.items(), self.app.settings.items())
