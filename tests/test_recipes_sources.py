"""The recipes that are sources or servers, and need no more than Tornado.

The page and the events only start and stop here; test_recipes_web.py has the rest.
"""

import asyncio
import contextlib
import importlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.websocket import websocket_connect

from server import WebSocketServer, make_app
from tests import support
from tests.programs import URL, RecipeCase
from tests.recipes import blocking_source, embedded, finite, growing_file, numbered_source
from tests.support import Recorder, following, needs, own_port, serving, until, url_at


class ServerTests(RecipeCase):
    async def test_ctrl_c(self) -> None:
        """A copy beside the scripts serves at a free port, and ends quietly at Ctrl-C."""
        self.path.write_text("price\n")
        for command in (
            ["growing_file", self.path],
            ["numbered_source", self.path, "price"],
            ["embedded", "--url", self.url],
            ["events"],
            ["finite", "server"],
            ["page"],
        ):
            with self.subTest(command), self.recipe(*map(str, command), "--port=0") as server:
                await self.url_of(server)
                await self.interrupt(server)


class GrowingFileTests(RecipeCase):
    def append(self, data: bytes, path: Path | None = None) -> None:
        """Write to the end of the file, or of another one."""
        with (path or self.path).open("ab") as file:
            file.write(data)

    async def test_lines_become_samples(self) -> None:
        """A line that is appended is a sample, one that was there before is not."""
        self.append(b"before\n")
        with self.recipe("growing_file", self.path, "--port=0") as server:
            client = Recorder(await self.url_of(server))
            async with following(client):
                self.append(b"1\r\n\n\xff\n")
                await until(lambda: client.samples == ["1", "", "\ufffd"], lambda: client.samples)

    def test_half_a_line_waits(self) -> None:
        """A line in pieces is one sample; a truncated file is read from its new start."""
        self.append(b"first\nsec")
        with contextlib.closing(growing_file.new_lines(self.path)) as lines:
            self.assertEqual(next(lines), ["first"])
            self.append(b"on")
            self.assertEqual(next(lines), [])
            self.append(b"d\nthird\nhalf")
            self.assertEqual(next(lines), ["second", "third"])
            self.path.write_bytes(b"new\n")
            self.assertEqual(next(lines), ["new"])

    def test_missing_and_replaced(self) -> None:
        """A file may come later; when it is renamed, it is read to its end, then the new one."""
        renamed = self.folder / "renamed"
        with contextlib.closing(growing_file.new_lines(self.path)) as lines:
            self.assertEqual(next(lines), [])
            self.append(b"first\n")
            self.assertEqual(next(lines), ["first"])
            self.path.rename(renamed)
            self.assertEqual(next(lines), [])
            self.path.touch()  # the writer has not opened it yet
            self.assertEqual(next(lines), [])
            self.append(b"last\nhalf a li", renamed)  # its half a line is never completed
            self.append(b"the first line of the new file\n")  # longer than all of the old one
            texts = [*next(lines), *next(lines)]
            self.assertEqual(texts, ["last", "the first line of the new file"])


class NumberedSourceTests(RecipeCase):
    async def test_kills(self) -> None:
        """While the server is killed in mid-file again and again, a client gets each row once."""
        rows = [None if number % 50 == 7 else number for number in range(400)]  # None is bad
        self.path.write_text("\n".join(["day,price", *(f"x,{row}" for row in rows)]))
        port = self.enterContext(own_port())
        command = "numbered_source", self.path, "price", "--interval=2", "--port", port
        client = Recorder(url_at(port))
        async with following(client):
            for goal in 30, 130, 230, 400:
                with self.recipe(*command):
                    await until(lambda: client.position >= goal)  # noqa: B023
        self.assertEqual((client.samples, client.missed), (rows, 0))

    def test_bad_rows(self) -> None:
        """A row without a number becomes None, and one line in the log; the others are sent."""
        bad = ["", "b", "b,", "b,x", "b,inf", "b,nan", "b,\ufffd", '"b\n,2",']
        bad.append("b" * 140_000 + ",1")  # longer than the csv module takes
        for row in bad:
            text = f'day,price\r\na,1\r\n{row}\r\n"c\r\n",3\r\n'  # the last has a line break inside
            lines = text.splitlines(keepends=True)
            with self.subTest(row[:20]), self.assertLogs("source") as logged:
                self.assertEqual([*numbered_source.read(lines, "price")], [1, None, 3])
                self.assertIn("row 1 is sent as null", logged.output[0])
                self.assertEqual(len(logged.output), 1)

    def test_several_columns(self) -> None:
        """Another `read_row` makes a sample of several columns; a row without one is still None."""
        quote = lambda row, column: [row["symbol"], float(row[column])]
        lines = ["symbol,price", "ACME,10", "ACME,"]
        with mock.patch.object(numbered_source, "read_row", quote), self.assertLogs("source"):
            self.assertEqual([*numbered_source.read(lines, "price")], [["ACME", 10], None])

    async def test_client_that_is_ahead(self) -> None:
        """A client that has more rows than were sent is told what may have happened."""
        async with serving(make_app(numbered_source.Rows)) as url:
            with self.assertRaisesRegex(HTTPClientError, "400: .*if the count file was deleted"):
                await websocket_connect(f"{url}?epoch={numbered_source.Rows.stream.epoch}&offset=9")

    async def test_count_is_saved_first(self) -> None:
        """The count of rows is in its file before a row is sent, so no client is ahead of it."""
        seen, count_file = [], self.folder / "count"
        note = lambda samples: seen.append((samples, count_file.read_text()))
        with mock.patch.object(numbered_source.Rows, "send_message", note):
            await numbered_source.play(iter([13, 14]), 3, count_file, 0)
        self.assertEqual(seen, [([13], "4"), ([14], "5")])

    async def test_refusals(self) -> None:
        """A column that is not there, and a count of more rows than there are, are refused."""
        self.path.write_text("price\n10\n")
        numbered = "numbered_source", self.path
        await self.refuses("there is no column 'prise' in .*", *numbered, "prise")
        self.path.with_name(f"{self.path.name}.count").write_text("2")
        await self.refuses("2 rows were sent, but there are only 1 now", *numbered, "price")


class BlockingSourceTests(RecipeCase):
    def test_pace(self) -> None:
        """A reading begins on a full second, or after a pause if one failed; they end with the server."""
        clock = mock.Mock(now=0.25)
        clock.perf_counter = lambda: clock.now
        clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
        # A SystemExit is no failed reading: if the loop goes on too long, it ends the test.
        readings = mock.Mock(side_effect=["a", "b", TimeoutError("silent"), "c", "d", SystemExit])
        begun: list[float] = []

        def read() -> Any:
            begun.append(clock.now)
            clock.now += 0.25
            return readings()

        self.enterContext(mock.patch.object(blocking_source, "time", clock))
        send = self.enterContext(mock.patch.object(WebSocketServer, "send_message"))
        send.side_effect = None, ValueError("no JSON"), None, RuntimeError("the loop is closed")
        with self.assertLogs("source") as logged:
            blocking_source.follow(read, interval=1, pause=60)
        self.assertEqual(begun, [1, 2, 3, 64, 65])  # the third fails at 3.25, pauses until 63.25
        self.assertEqual(send.mock_calls, [mock.call([reading]) for reading in "abcd"])
        no_json, silent = logged.output
        self.assertIn("no JSON", no_json)
        self.assertIn("TimeoutError('silent')", silent)

    async def test_reading_that_hangs(self) -> None:
        """Ctrl-C does not wait for a reading."""
        file = self.folder / "blocking_source.py"
        hangs = "print('reads', flush=True); time.sleep(1000)"
        file.write_text(file.read_text().replace("time.sleep(0.1)", hangs))
        with self.recipe("blocking_source", "--port=0") as server:
            await self.shows(server, "reads")
            await self.interrupt(server)


class ListeningTests(RecipeCase):
    async def test_both_programs(self) -> None:
        """Whoever knows the key sets p for all; a wrong key or a bad p is refused with a reason."""
        self.enterContext(mock.patch.dict(os.environ, KEY="k"))
        with self.recipe("listening", "server", "--port=0") as server:
            follower = Recorder(url := await self.url_of(server))
            for key, p, status, shown in (
                ("k", 0, 0, ""),
                ("k", 2, 1, "refused: 1007 p must be a number from 0 to 1\n"),
                ("\u043a", 1, 1, "refused: 1008 wrong key\n"),  # which is not ASCII
            ):
                os.environ["KEY"] = key
                with self.recipe("listening", "client", p, "--url", url) as client:
                    self.assertEqual(await self.ends(client, status), shown)
            async with following(follower):  # with p 0.72, so many 0s come once in 10 ** 11 times
                await until(lambda: follower.samples[-20:] == [0] * 20)
            await self.interrupt(server)


@needs("trustme")
class PrivateTests(RecipeCase):
    async def test_both_programs(self) -> None:
        """Only a client with the token gets the stream, and neither side logs the token."""
        self.enterContext(mock.patch.dict(os.environ, TOKEN="t0ken"))
        authority = importlib.import_module("trustme").CA()
        authority.cert_pem.write_to_path(ca := str(self.folder / "ca"))
        issued = authority.issue_cert("localhost").private_key_and_cert_chain_pem
        issued.write_to_path(both := str(self.folder / "certificate and key"))
        with self.recipe("private", "server", both, both, "--port=0") as server:
            url = await self.url_of(server)
            for header in "", "t0ken", "Bearer t0kenx", "Bearer t0ken\u00e9":
                request = HTTPRequest(url, headers={"Authorization": header}, ca_certs=ca)
                with self.subTest(header), self.assertRaisesRegex(HTTPClientError, "401: .* token"):
                    await websocket_connect(request)
            with self.recipe("private", "client", ca, url) as client:
                self.assertNotIn("t0ken", await self.shows(client, "connected to wss://"))
                self.assertNotIn("t0ken", await self.interrupt(client))
            self.assertNotIn("t0ken", await self.interrupt(server))
        await self.refuses("the URL must begin with wss://.*", "private", "client", ca, "ws://x")


class FiniteTests(RecipeCase):
    async def test_slow_client(self) -> None:
        """A client that comes late gets all, and the server also waits for a slow one."""
        # More than a history usually keeps, and than the network holds.
        results = [str(number).zfill(1_000) for number in range(12_000)]

        async def compute(below: int) -> AsyncIterator[str]:
            for result in results:
                yield result

        self.enterContext(mock.patch.object(finite, "compute", compute))
        port = self.enterContext(own_port())
        task = asyncio.create_task(finite.serve_results(below=0, wait=3600, port=port))
        await asyncio.sleep(0)  # now it has made the stream
        await until(lambda: finite.Results.stream.end == 12_001)  # with their count
        with socket.create_connection(("127.0.0.1", port)) as slow:
            slow.send(support.HANDSHAKE)  # it does not read
            await until(lambda: finite.Results.clients)
            client = finite.Collector(url_at(port))
            await asyncio.wait_for(client.run(), support.PATIENCE)
            self.assertEqual((client.results, client.complete), (results, True))
            await asyncio.sleep(0.3)  # in which the server would end
            # It still listens. (The task says little: a server that ends waits for the slow one.)
            socket.create_connection(("127.0.0.1", port)).close()
        # Now the slow one has left, and another has had everything: so the server ends.
        await asyncio.wait_for(task, support.PATIENCE)

    def test_restart(self) -> None:
        """When the server begins anew, so does a client, which notices if it lacks something."""
        client = finite.Collector(URL)
        for epoch, samples in ("first", [2, 3]), ("second", [5, {"results": 2}]):
            client.epoch = epoch
            client.on_message(samples)
        self.assertEqual((client.results, client.complete), ([5], False))

    async def test_both_programs(self) -> None:
        """A client shows a summary, and both end; one that is stopped earlier has status 1."""
        with self.recipe("finite", "server", "--below=100", "--port=0") as server:
            with self.recipe("finite", "client", "--url", await self.url_of(server)) as client:
                self.assertRegex(await self.ends(client), "\n25 primes complete, the last is 97\n$")
            await self.ends(server)
        with self.recipe("finite", "client", "--url", self.url) as client:
            await self.shows(client, "connected")
            await self.interrupt(client, status=1)
        with self.recipe("finite", "server", "--below=9", "--wait=0", "--port=0") as server:
            await self.ends(server)


class EmbeddedTests(support.ServedCase):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.statistics = embedded.Statistics(self.url, 0.01)
        self.app = embedded.make_application(self.statistics, "pass", "secret")
        self.app_url = await self.enterAsyncContext(serving(self.app))

    async def fetch(self, path: str, cookie: str = "", **options: Any) -> HTTPResponse:
        """Ask the application for a page."""
        url = self.app_url.replace("ws:", "http:").replace("/websocket", path)
        options |= {"headers": {"Cookie": cookie}, "follow_redirects": False}
        return await AsyncHTTPClient().fetch(url, raise_error=False, **options)

    async def test_strangers(self) -> None:
        """A stranger, even with a forged cookie, gets no page and no stream, but the health check."""
        for path, status in ("/", 302), ("/statistics", 302), ("/health", 200), ("/websocket", 403):
            with self.subTest(path):
                self.assertEqual((await self.fetch(path, "user=me")).code, status)
        wrong = await self.fetch("/login", method="POST", body="password=guess")
        self.assertEqual((wrong.code, wrong.headers.get("Set-Cookie")), (403, None))

    async def test_members(self) -> None:
        """A member gets the page, the statistics of the other stream, and its samples."""
        login = await self.fetch("/login", method="POST", body="password=pass")
        cookie = login.headers["Set-Cookie"].partition(";")[0]
        member = Recorder(self.app_url)
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
        settings = self.app.settings
        self.assertEqual(settings | make_app(self.handler).settings, settings)
