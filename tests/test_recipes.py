"""The recipes that need no more than Tornado, alone and as programs; and what runs all of them.

Recipes with a state in a file, for browsers, or with other libraries are in the modules beside it.
"""

import asyncio
import datetime
import functools
import importlib.util
import itertools
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.testing import gen_test
from tornado.websocket import websocket_connect

from server import make_app
from tests.recipes import (
    blocking_source,
    growing_file,
    json_samples,
    listening_server,
    mean_variance,
    relay,
    slow_work,
)
from tests.support import ROOT, TIMEOUT, PairCase, Recorder, free_port, fresh_server, until

RECIPES = ROOT / "tests" / "recipes"
URL = "ws://127.0.0.1:9/websocket"  # for clients that never start

test = gen_test(timeout=20 * TIMEOUT)  # until() fails earlier, and says where


class Program(subprocess.Popen[bytes]):
    """A program with its two outputs in files."""

    def __init__(self, command: Iterable[object], folder: Path, cwd: Path) -> None:
        new = functools.partial(tempfile.NamedTemporaryFile, dir=folder, delete=False)
        with new() as out, new() as err:
            super().__init__([*map(str, command)], stdout=out, stderr=err, cwd=cwd)
        self.out, self.err = Path(out.name), Path(err.name)

    async def line(self, number: int = 0) -> str:
        """Return a line that the program prints, once it is complete."""
        await until(lambda: self.poll() is not None or self.out.read_text().count("\n") > number)
        lines = self.out.read_text().splitlines()
        assert len(lines) > number, f"the program has ended: {self.err.read_text()}"
        return lines[number]


class RecipeCase(PairCase):
    """A test that runs recipes as programs."""

    warnings: ClassVar[list[str]] = ["-W", "error"]

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "my file"

    def start(self, name: str, *options: object, port: int | None = None) -> Program:
        """Run a recipe from the root; or a copy beside the scripts, with this port as its own."""
        command, cwd = ["-m", f"tests.recipes.{name}"], ROOT
        if port is not None:
            copies = Path(tempfile.mkdtemp(dir=self.folder))
            for path in ROOT / "server.py", ROOT / "client.py", *RECIPES.glob("*.*"):
                text = re.sub("876[56]", str(port), path.read_text(encoding="utf-8"))
                (copies / path.name).write_text(text, encoding="utf-8")
            command, cwd = [str(copies / f"{name}.py")], self.folder
        python = [sys.executable, *self.warnings]
        program = Program([*python, *command, *options], self.folder, cwd)
        self.addCleanup(program.wait)
        self.addCleanup(program.kill)  # which is called before
        return program

    async def ended(self, program: Program) -> tuple[int, str]:
        """Return the status of a program that ends by itself, and its log."""
        await until(lambda: program.poll() is not None)
        return program.returncode, program.err.read_text()

    async def interrupt(self, *programs: Program) -> None:
        """Press Ctrl-C, and check that each program ends quietly."""
        for program in programs:
            program.send_signal(signal.SIGINT)
            status, log = await self.ended(program)
            self.assertEqual(status, 0, log)
            self.assertNotRegex(log, "Traceback|Exception ignored")

    async def goodbye(self, program: Program, recorder: Recorder) -> None:
        """Press Ctrl-C, and check that the client of the stream is told."""
        with self.assertLogs("client", "WARNING") as logged:
            await self.interrupt(program)
            await until(lambda: logged.output)
            recorder.stop()
        self.assertIn("closed by the server: 1001 'going away'", logged.output[0])

    def recorder(self, url: str) -> Recorder:
        """Follow a stream."""
        client = Recorder(url)
        self.follow(client)
        return client


class UsageTests(RecipeCase):
    """All recipes that take arguments, and the one that is no program."""

    @test
    async def test_missing_argument(self) -> None:
        """A recipe without its arguments says how it is used, with status 2."""
        for command in (
            *("growing_file", "numbered_source FILE", "checkpoint", "changing_coin"),
            *("set_p KEY", "other_libraries", "private", "private client", "private server CERT"),
        ):
            with self.subTest(command):
                status, log = await self.ended(self.start(*command.split()))
                self.assertEqual(status, 2)
                self.assertRegex(log, r"\Ausage: .*\n(.*\n)*.*: error: .*required: .*\n\Z")

    @test
    async def test_wrong_argument(self) -> None:
        """A port, a URL or a file that cannot be right is one line of error, and no traceback."""
        for command, words in (
            ("page 99999", "port from 0 to 65535"),
            ("events x", "invalid int value"),
            ("relay --url http://localhost", "not a URL"),
            ("set_p KEY 1 --url http://localhost", "must begin with ws://"),
            (f"growing_file {self.folder}", "Is a directory"),
        ):
            with self.subTest(command):
                status, log = await self.ended(self.start(*command.split()))
                self.assertIn(status, (1, 2))
                self.assertRegex(log, rf"\A(usage: .*\n)?.*: error: .*{words}.*\n\Z")

    @test
    async def test_notebook(self) -> None:
        """The notebook, run as a program, says what it is for."""
        status, log = await self.ended(self.start("notebook"))
        self.assertEqual(status, 1)
        self.assertRegex(log, r"\AIn a notebook: a picture")


class ServerTests(RecipeCase):
    """All servers that need no more than Tornado."""

    @test
    async def test_feeds_a_client_and_says_goodbye(self) -> None:
        """From the root or copied, it feeds a client, which is told at Ctrl-C that it goes away."""
        self.path.write_text("price\n10\n\n12\n")
        changing = "changing_coin server --p=0 --then=1 --after=5 --interval=1 --port=0"
        coin: Callable[[list[Any]], bool] = lambda samples: {*samples} <= {0, 1}
        check: Callable[[list[Any]], bool]
        for command, port, check in (
            (["blocking_source"], 0, lambda samples: abs(samples[0] - 20) < 10),  # 20 sds
            (changing.split(), None, lambda samples: samples[:10] == [0] * 5 + [1] * 5),
            (["numbered_source", self.path, "price"], 0, lambda samples: samples == [10, None, 12]),
            (["page"], 0, coin),
            (["page", 0], None, coin),
            (["events"], 0, coin),
            (["events", 0], None, coin),
            (["two_streams"], 0, coin),
        ):
            with self.subTest(command):
                name, *options = command
                program = self.start(str(name), *options, port=port)
                recorder = self.recorder(await program.line())
                least = {"blocking_source": 2, "numbered_source": 3}.get(str(name), 10)
                await until(lambda: len(recorder.samples) >= least)  # noqa: B023
                self.assertTrue(check(recorder.samples), recorder.samples)
                await self.goodbye(program, recorder)


class TakenPortTests(RecipeCase):
    """All servers, when another program has their port."""

    warnings: ClassVar[list[str]] = []  # Tornado leaves a socket open when its port is taken

    @test
    async def test_is_one_line(self) -> None:
        """The program ends with status 1 and one line, and has served nobody."""
        self.path.write_text("price\n10\n")
        self.enterContext(mock.patch.dict(os.environ, {"TOKEN": "t0ken"}))
        for name, *options in (
            *(["growing_file", self.path], ["numbered_source", self.path, "price"]),
            *(["blocking_source"], ["two_streams"], ["json_samples"], ["listening_server"]),
            *(["page"], ["events"], ["relay"], ["changing_coin", "server"]),
        ):
            with self.subTest(name):
                program = self.start(str(name), *options, port=self.port)
                status, log = await self.ended(program)
                self.assertEqual(status, 1)
                self.assertRegex(log, rf"\Acannot listen on localhost:{self.port}: .*\n\Z")
                self.assertNotIn("ws://", program.out.read_text())
        self.assertFalse(self.path.with_name("my file.count").exists())


class GrowingFileTests(RecipeCase):
    """growing_file.py."""

    def append(self, data: bytes) -> None:
        """Write to the end of the file."""
        with self.path.open("ab") as file:
            file.write(data)

    def begin(self, data: bytes) -> Generator[list[str], None, None]:
        """Return what reads the new lines of a file that has this in it at first."""
        self.append(data)
        lines = growing_file.new_lines(self.path)
        self.addCleanup(lines.close)
        next(lines)
        return lines

    def test_half_a_line_waits(self) -> None:
        """A line that is written in pieces, cut anywhere, is one sample; those before are none."""
        numbers = [f"line {number}" for number in range(1_000)]
        data = "\r\n".join([*numbers, ""]).encode()
        cuts = sorted({0, len(data), *random.Random(1).sample(range(len(data)), 50)})
        lines = self.begin(b"before\nli")
        self.append(b"ne -1\n")
        seen = next(lines)
        for start, end in itertools.pairwise(cuts):
            self.append(data[start:end])
            seen += next(lines)
        self.assertEqual(seen, ["line -1", *numbers])

    def test_truncated(self) -> None:
        """A file that was copied and truncated is read from its new start."""
        lines = self.begin(b"")
        for count, rest in (100, b"half a li"), (95, b""):
            self.path.write_bytes(b"".join(b"%d\n" % number for number in range(count)) + rest)
            self.assertEqual(next(lines), [str(number) for number in range(count)])

    def test_replaced(self) -> None:
        """A file that was renamed is read to its end, then the one that took its name."""
        lines = self.begin(b"old\n")
        renamed = self.path.rename(self.folder / "renamed")
        self.assertEqual(next(lines), [])
        self.path.touch()  # the writer has not opened it yet
        self.assertEqual(next(lines), [])
        with renamed.open("ab") as file:
            file.write(b"last\nhalf a li")
        self.append(b"a much longer first line\n")
        self.assertEqual([*next(lines), *next(lines)], ["last", "a much longer first line"])

    def test_file_that_comes_later(self) -> None:
        """A file that is missing at first is read from its start."""
        lines = growing_file.new_lines(self.path)
        self.addCleanup(lines.close)
        self.assertEqual(next(lines), [])
        self.append(b"first\n\xff\n")
        self.assertEqual(next(lines), ["first", "\ufffd"])

    @test
    async def test_program(self) -> None:
        """The lines come to a client, a blank one too, and the client is told at Ctrl-C."""
        self.append(b"before\n")
        program = self.start("growing_file", self.path, port=0)
        recorder = self.recorder(await program.line())
        await until(lambda: recorder.epoch)
        self.append(b"1\r\n\n2\n")
        await until(lambda: len(recorder.samples) == 3)
        self.assertEqual(recorder.samples, ["1", "", "2"])
        await self.goodbye(program, recorder)


class BlockingSourceTests(RecipeCase):
    """blocking_source.py."""

    @test
    async def test_failed_reading(self) -> None:
        """A reading that fails, or is no JSON, is a line in the log, and the next one follows."""
        readings: list[Any] = [1.5, TimeoutError("silent"), math.nan, {1}, 2.5]
        if importlib.util.find_spec("numpy"):
            readings[3] = __import__("numpy").int64(1)
        ended = threading.Event()
        self.addCleanup(ended.set)

        def measure() -> Any:
            if not readings:
                ended.wait(TIMEOUT)
            reading = readings.pop(0) if readings else 0
            if isinstance(reading, Exception):
                raise reading
            return reading

        stream = mock.patch.object(blocking_source, "WebSocketServer", self.server)
        source = mock.patch.object(blocking_source, "measure", measure)
        with stream, source, self.assertLogs("source", "WARNING") as logged:
            task = asyncio.ensure_future(blocking_source.follow())
            await until(lambda: self.server.end == 2 or task.done())
            ended.set()
            task.cancel()
            await asyncio.wait([task])
        self.assertEqual(self.server.history[:2], [1.5, 2.5])
        self.assertEqual(len(logged.output), 3)
        self.assertIn("no sample: TimeoutError('silent')", logged.output[0])


class ModelTests(RecipeCase):
    """mean_variance.py and json_samples.py."""

    def test_known_answer(self) -> None:
        """1, 2, 3, 4 have mean 10/4 and variance (2.25 + 0.25 + 0.25 + 2.25)/3 = 5/3."""
        client = mean_variance.NumberClient(self.url)
        self.assertTrue(math.isnan(client.model.variance))
        client.on_message([1, 2])
        client.on_message([3, "4"])  # such as a line of a file
        self.assertAlmostEqual(client.model.mean, 10 / 4)
        self.assertAlmostEqual(client.model.variance, 5 / 3)

    def test_numbers_far_from_zero(self) -> None:
        """The result agrees with the statistics module where a sum of squares would not."""
        client, dice = mean_variance.NumberClient(self.url), random.Random(1)
        numbers = [1e9 + dice.gauss(0, 1) for _ in range(5_000)]
        client.on_message(numbers)
        self.assertAlmostEqual(client.model.variance, statistics.variance(numbers), delta=1e-6)

    def test_refused_samples(self) -> None:
        """What a model cannot take costs that sample, with a count and one line."""
        number, thermometer = mean_variance.NumberClient(URL), json_samples.Thermometers(URL)
        places = [1, [], {}, {"place": "roof"}, {"place": 1, "celsius": 1}]
        bad: list[Any] = ["", "n/a", "nan", "inf", "1e308", None, [], {}, 10**400]
        for client, samples, words in (
            (number, [1, *bad, 2], "refused 9 samples, the first is ''"),
            (thermometer, [*places, {"place": "roof", "celsius": 15}], "refused 5 .* first is 1"),
        ):
            with self.assertLogs("model", "WARNING") as logged:
                client.on_message(samples)
            self.assertRegex("\n".join(logged.output), rf"\AWARNING:model:{words}\Z")
        self.assertEqual((number.model.count, number.model.mean, number.refused), (2, 1.5, 9))
        self.assertEqual((thermometer.newest, thermometer.refused), (("roof", 15), 5))

    @test
    async def test_mean_variance(self) -> None:
        """The program prints the model once a second, and ends quietly at Ctrl-C."""
        self.server.send_message([1, 2, "x", 3, 4])
        program = self.start("mean_variance", "--url", self.url)
        expected = "4 samples  mean 2.5  variance 1.66667  missed 0  refused 1\n"
        await until(lambda: expected in program.out.read_text())
        await self.interrupt(program)

    @test
    async def test_json_samples(self) -> None:
        """The client of the program shows what its server has sent, and another gets the same."""
        program = self.start("json_samples", port=free_port())
        recorder = self.recorder(await program.line())
        await until(lambda: "', " in program.out.read_text() and recorder.samples)
        (shown, *_) = re.findall(r"\(.*\)", program.out.read_text())
        self.assertIn(shown, [str((s["place"], s["celsius"])) for s in recorder.samples])
        await self.goodbye(program, recorder)


class SlowWorkTests(RecipeCase):
    """slow_work.py."""

    def begin(self, work: Any) -> slow_work.SlowClient:
        """Follow the stream in a thread, with this work on each sample."""
        self.enterContext(mock.patch.object(slow_work, "work", work))
        client = slow_work.SlowClient(self.url, 0.01)
        client.start()
        return client

    @test
    async def test_stops_after_the_calls_that_run(self) -> None:
        """After `stop` no call begins, and the next `start` goes on with the first undone sample."""
        begun: list[int] = []
        go_on = threading.Event()
        self.addCleanup(go_on.set)

        def work(sample: int) -> int:
            begun.append(sample)
            if sample >= 4:
                go_on.wait(TIMEOUT)
            return sample

        self.server.send_message([*range(240)])
        with self.assertLogs("work", "INFO") as logged:
            client = self.begin(work)
            await until(lambda: len(begun) == 8)
            stopping = asyncio.ensure_future(asyncio.to_thread(client.stop))
            await until(lambda: client.stopping)
            go_on.set()
            await stopping
            self.assertEqual((sorted(begun), client.position), ([*range(8)], 8))
            client.start()
            await until(lambda: client.position == 240)
            await asyncio.to_thread(client.stop)
        results = [record.getMessage() for record in logged.records]
        self.assertEqual(results, [*map(str, range(240))])

    @test
    async def test_work_that_fails(self) -> None:
        """After an exception the samples of that part come again, and those before do not."""
        tried: list[int] = []

        def work(sample: int) -> int:
            tried.append(sample)
            if sample == 5 and tried.count(5) == 1:
                raise OSError("no connection to the database")
            return sample

        self.server.send_message([*range(10)])
        with self.assertLogs() as logged:
            client = self.begin(work)
            await until(lambda: client.position == 10 and 9 in tried)
            await asyncio.to_thread(client.stop)
        self.assertEqual((tried.count(0), tried.count(5)), (1, 2))
        results = [record.getMessage() for record in logged.records if record.name == "work"]
        self.assertEqual((results, client.missed), ([*map(str, range(10))], 0))

    @test
    async def test_program(self) -> None:
        """Results are in the log, and Ctrl-C closes the connection."""
        self.server.send_message([*range(240)])
        program = self.start("slow_work", "--url", self.url)
        await until(lambda: "3 is done" in program.err.read_text())
        (handler,) = self.server.clients
        await self.interrupt(program)
        await until(lambda: not self.server.clients)
        self.assertEqual(handler.close_code, 1000)
        self.assertNotIn("100 is done", program.err.read_text())


class RelayTests(RecipeCase):
    """relay.py."""

    @test
    async def test_program(self) -> None:
        """The posterior is a stream and a page, and stays as it is when the first server restarts."""
        program = self.start("relay", "--url", self.url, port=0)
        results = self.recorder(url := await program.line())
        await until(lambda: results.epoch and self.server.clients)
        self.server.send_message([1, 1, 0])
        await until(lambda: results.samples)
        await self.restart()
        self.server.send_message([1])
        await until(lambda: len(results.samples) == 2)
        page = await AsyncHTTPClient().fetch(url.replace("ws:", "http:")[: -len("websocket")])
        self.assertEqual(page.body, b"Beta(4, 2)  mean 0.6667  sd 0.1782")
        self.assertEqual(page.headers["Refresh"], "1")
        self.assertEqual([sample["trials"] for sample in results.samples], [3, 4])
        self.assertAlmostEqual(results.samples[-1]["sd"], math.sqrt(8 / 252))
        self.assertNotEqual(results.epoch, self.server.epoch)
        (handler,) = self.server.clients
        await self.goodbye(program, results)
        self.assertEqual(handler.close_code, 1000)

    @test
    async def test_sample_that_is_no_json(self) -> None:
        """A result that cannot be sent changes nothing: no sample is counted twice."""
        now: list[Any] = [datetime.datetime(2026, 1, 1)] * 3
        summary = lambda posterior: {"time": now.pop() if now else 0, "posterior": [*posterior]}
        results = fresh_server()
        self.enterContext(mock.patch.multiple(relay, WebSocketServer=results, summary=summary))
        with self.assertLogs("client", "WARNING"):
            self.follow(relay.Relay(self.url, 0.01))
            self.server.send_message([1, 1, 0])
            await until(lambda: results.history)
        self.assertEqual(results.history, [{"time": 0, "posterior": [3, 2]}])


class ListeningServerTests(RecipeCase):
    """listening_server.py and set_p.py."""

    @test
    async def test_refused(self) -> None:
        """A message of the wrong type, key or range is refused with its reason, and changes nothing."""
        handler = fresh_server(listening_server.ListeningServer)
        url = f"ws://{self.serve(make_app(handler))}/websocket"
        key, coin = listening_server.ListeningServer.key, listening_server.ListeningServer.coin
        message: Any
        wrong_p = (1007, "p must be a number from 0 to 1")
        for message, answer in [
            (f"{key} 0.5".encode(), (1003, "text only")),
            *[(text, (1008, "wrong key")) for text in ("", f"{key[:-1]} 0.5", "ключ 0.5")],
            *[(f"{key} {p}", wrong_p) for p in ("", "half", "1.5", "nan", "0.5 0.6")],
        ]:
            with self.subTest(message):
                connection = await websocket_connect(url)
                await connection.write_message(message, binary=isinstance(message, bytes))
                while await connection.read_message() is not None:
                    pass
                connection.close()
                self.assertEqual((connection.close_code, connection.close_reason), answer)
                self.assertIs(listening_server.ListeningServer.coin, coin)
        await until(lambda: not handler.clients)

    @test
    async def test_both_programs(self) -> None:
        """The client sets p to 0, and from then on every client gets 0s only; a stranger does not."""
        program = self.start("listening_server", port=0)
        key, url = await program.line(), await program.line(1)
        recorder = self.recorder(url)
        for arguments, told in [
            (["a-guess", "1"], (1, "refused: 1008 wrong key\n")),
            ([key, "-0.1"], (1, "refused: 1007 p must be a number from 0 to 1\n")),
            ([key, "0"], (0, "")),
        ]:
            self.assertEqual(await self.ended(self.start("set_p", "--url", url, *arguments)), told)
        # By chance, with p = 0.72, that would come about once in 10 ** 11 times.
        await until(lambda: recorder.samples[-20:] == [0] * 20)
        await self.goodbye(program, recorder)


class TwoStreamsTests(RecipeCase):
    """two_streams.py."""

    @test
    async def test_program(self) -> None:
        """Each of the two URLs leads to a stream of its own."""
        program = self.start("two_streams", port=0)
        usual = self.recorder(url := await program.line())
        rare = self.recorder(url.replace("websocket", "rare"))
        await until(lambda: min(len(rare.samples), len(usual.samples)) >= 50)
        self.assertNotEqual(rare.epoch, usual.epoch)
        # The means of 50 samples are 0.05 and 0.72, each with an sd below 0.07.
        self.assertLess(statistics.fmean(rare.samples) + 0.2, statistics.fmean(usual.samples))
        await self.goodbye(program, usual)


@unittest.skipUnless(importlib.util.find_spec("trustme"), "needs trustme: see requirements.txt")
class PrivateTests(RecipeCase):
    """private.py."""

    def setUp(self) -> None:
        super().setUp()
        import trustme

        authority = trustme.CA()
        certificate = authority.issue_cert("localhost", "127.0.0.1")
        self.authority, self.certificate, self.key = [
            str(self.folder / name) for name in ("ca.pem", "cert.pem", "key.pem")
        ]
        authority.cert_pem.write_to_path(self.authority)
        certificate.cert_chain_pems[0].write_to_path(self.certificate)
        certificate.private_key_pem.write_to_path(self.key)
        self.enterContext(mock.patch.dict(os.environ, {"TOKEN": "t0ken\n"}))

    @test
    async def test_both_programs(self) -> None:
        """Only who has the token gets the stream, and neither side logs a token."""
        server = self.start("private", "server", self.certificate, self.key, "--port", 0)
        url = await server.line()
        self.assertRegex(url, "^wss://")
        for headers, reason in [
            ([], "no token"),
            (["Bearer t0kenx"], "wrong token"),
            (["t0ken"], "wrong token"),
            (["Bearer t0ken\u00e9"], "wrong token"),
            (["Bearer t0ken"] * 2, "more than one token"),
        ]:
            request = HTTPRequest(url, ca_certs=self.authority)
            for header in headers:
                request.headers.add("Authorization", header)
            with self.subTest(reason), self.assertRaises(HTTPClientError) as refused:
                await websocket_connect(request)
            self.assertEqual((refused.exception.code, refused.exception.message), (401, reason))
        client = self.start("private", "client", self.authority, url)
        os.environ["TOKEN"] = "t0ken-of-another"
        stranger = self.start("private", "client", self.authority, url)
        await until(lambda: re.search(r"Beta\(\d\d", client.out.read_text()))
        await until(lambda: "HTTP 401: wrong token; next" in stranger.err.read_text())
        await self.interrupt(server)
        await until(lambda: "1001 'going away'" in client.err.read_text())
        await self.interrupt(client, stranger)
        for program in server, client, stranger:
            self.assertNotIn("t0ken", program.out.read_text() + program.err.read_text())
        self.assertIn("401 GET", server.err.read_text())

    @test
    async def test_refused_at_once(self) -> None:
        """A ws:// URL, no token, or one that is no header: one line, before anything is sent."""
        files = [self.certificate, self.key, "--port", 0]
        for token, options, words in (
            ("t0ken", ["client", self.authority, self.url], "must begin with wss://"),
            ("", ["client", self.authority, self.url], "TOKEN must be set"),
            ("t0 ken", ["server", *files], "TOKEN must be set"),
            ("t\u00f6ken", ["server", *files], "TOKEN must be set"),
        ):
            with self.subTest(token), mock.patch.dict(os.environ, {"TOKEN": token}):
                status, log = await self.ended(self.start("private", *options))
                self.assertEqual(status, 2)
                self.assertRegex(log, rf"\A.*: error: .*{words}.*\n\Z")
        self.assertFalse(self.server.clients)


if __name__ == "__main__":
    unittest.main()
