"""The recipes that need no more than Tornado, alone and as programs, and what runs every recipe.

Those with a state in a file, for browsers, or with other libraries are in the modules beside it.
"""

import ast
import asyncio
import datetime
import functools
import importlib.util
import inspect
import itertools
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any
from unittest import mock

from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest
from tornado.testing import gen_test
from tornado.websocket import websocket_connect

from tests.recipes import (
    blocking_source,
    growing_file,
    json_samples,
    mean_variance,
    relay,
    slow_work,
)
from tests.support import ROOT, TIMEOUT, PairCase, Recorder, free_port, fresh_server, until

RECIPES = ROOT / "tests" / "recipes"
URL = "ws://127.0.0.1:9/websocket"  # for clients that never start
# Tornado leaves a socket open when its port is taken, and a connection after a failed handshake.
LEFT = "ignore:unclosed <socket:ResourceWarning", "ignore:Unclosed WebSocketClient:ResourceWarning"
PYTHON = sys.executable, "-W", "error", "-W", LEFT[0], "-W", LEFT[1]


def which(program: str) -> str | None:
    """Find a program, also where Debian has daemons."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def needs(*modules: str, program: str = sys.executable) -> Callable[[Any], Any]:
    """Skip a test where one of these modules or the program is missing."""
    there = which(program) and all(map(importlib.util.find_spec, modules))
    names = f"{' '.join(modules)} {program}"
    return unittest.skipUnless(there, f"needs {names}: see tests/requirements.txt")


class Program(subprocess.Popen[bytes]):
    """A program with its two outputs in files."""

    def __init__(self, folder: Path, *command: object, cwd: Path = ROOT) -> None:
        new = functools.partial(tempfile.NamedTemporaryFile, dir=folder, delete=False)
        with new() as out, new() as err:
            super().__init__([*map(str, command)], stdout=out, stderr=err, cwd=cwd)
        self.out, self.err = Path(out.name).read_text, Path(err.name).read_text

    async def line(self, number: int = 0) -> str:
        """Return a line that the program prints, once it is complete."""
        await until(lambda: self.poll() is not None or self.out().count("\n") > number)
        return (self.out().splitlines() or [self.err()])[number]


class RecipeCase(PairCase):
    """A test that runs recipes as programs; it may be a coroutine."""

    def __init_subclass__(cls) -> None:
        test = gen_test(timeout=20 * TIMEOUT)  # until() fails earlier, and says where
        for name, method in list(vars(cls).items()):
            if name.startswith("test_") and inspect.iscoroutinefunction(method):
                setattr(cls, name, test(method))

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "my file"

    def program(self, *command: object, cwd: Path = ROOT) -> Program:
        """Run a command until the test ends, at most."""
        program = Program(self.folder, *command, cwd=cwd)
        self.addCleanup(program.wait)
        self.addCleanup(program.kill)  # which is called before
        return program

    def start(self, name: object, *options: object) -> Program:
        """Run a recipe from the root."""
        return self.program(*PYTHON, "-m", f"tests.recipes.{name}", *options)

    def copy(self, name: object, *options: object, port: int = 0) -> Program:
        """Run a recipe from a folder to which all were copied, with this as its port."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        for path in ROOT / "server.py", ROOT / "client.py", *RECIPES.glob("*.*"):
            text = re.sub("876[56]", str(port), path.read_text(encoding="utf-8"))
            (folder / path.name).write_text(text, encoding="utf-8")
        return self.program(*PYTHON, folder / f"{name}.py", *options, cwd=self.folder)

    async def ends(self, program: Program, status: int, log: str) -> None:
        """Check that a program ends by itself, and all that is in its log."""
        await until(lambda: program.poll() is not None)
        self.assertRegex(program.err(), rf"\A{log}\Z")
        self.assertEqual(program.returncode, status)

    async def interrupt(self, *programs: Program) -> None:
        """Press Ctrl-C, and check that each program ends quietly."""
        for program in programs:
            program.send_signal(signal.SIGINT)
            await self.ends(program, 0, r"[\s\S]*")
            self.assertNotRegex(program.err(), "Traceback|Exception ignored")

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


class ProgramTests(RecipeCase):
    async def test_feeds_a_client_and_says_goodbye(self) -> None:
        """From the root or copied, a server feeds a client, which is told at Ctrl-C."""
        self.path.write_text("price\n10\n\n12\n")
        (growing := self.folder / "growing").write_text("before\n")
        changing = ["changing_coin", "server", "--p=0", "--then=1", "--after=5", "--port=0"]
        coin = lambda samples: len(samples) > 4 and {*samples} <= {0, 1}
        shown = lambda samples: any(
            f"{(*sample.values(),)}\n" in program.out() for sample in samples
        )
        program: Program
        both_ends = functools.partial(self.copy, port=free_port())  # its own client needs to know
        for run, command, check in (
            (both_ends, ["json_samples"], shown),
            (self.copy, ["blocking_source"], lambda samples: samples and abs(samples[0] - 20) < 10),
            (self.start, changing, lambda samples: samples[:10] == [0] * 5 + [1] * 5),
            (self.copy, ["numbered_source", self.path, "price"], [10, None, 12].__eq__),
            (self.copy, ["growing_file", growing], ["1", "", "2"].__eq__),
            (self.copy, ["fast_lane"], coin),
            (self.start, ["page", "--port", 0], coin),
            (self.start, ["events", "--port", 0], coin),
        ):
            with self.subTest(command):
                recorder = self.recorder(await (program := run(*command)).line())
                await until(lambda: recorder.epoch)  # noqa: B023
                with growing.open("ab") as file:
                    file.write(b"1\r\n\n2\n")
                await until(functools.partial(check, recorder.samples))
                await self.goodbye(program, recorder)

    async def test_client_closes_its_connection(self) -> None:
        """A client shows what it makes of the samples, and closes its connection at Ctrl-C."""
        self.server.send_message([1, 2, "x", 3, 4, *range(240)])
        for name, shown in (
            ("mean_variance", "244 samples  mean 117.582  variance 4962.32  missed 0  refused 1\n"),
            ("slow_work", "x is done\n"),
        ):
            program = self.copy(name, "--url", self.url)
            await until(lambda: shown in program.out() + program.err())  # noqa: B023
            (handler,) = self.server.clients
            await self.interrupt(program)
            await until(lambda: not self.server.clients)
            self.assertEqual(handler.close_code, 1000)
        self.assertNotIn("100 is done", program.err())

    async def test_taken_port(self) -> None:
        """A server whose port is taken ends with status 1 and one line, and has served nobody."""
        (self.folder / "data").write_text("price\n10\n")
        for command in (
            *("blocking_source", "two_streams", "json_samples", "listening_server", "fast_lane"),
            *("page", "events", "relay", "changing_coin server", "growing_file data"),
            "numbered_source data price",
        ):
            with self.subTest(command):
                program = self.copy(*command.split(), port=self.port)
                await self.ends(program, 1, rf"cannot serve on localhost:{self.port}: .*\n")
                self.assertNotIn("ws://", program.out())
        self.assertFalse((self.folder / "data.count").exists())

    async def test_refusals(self) -> None:
        """What is missing or cannot be right is one line, with the usage or without."""
        usage = r"usage: .*\n(?: +.*\n)*"
        self.enterContext(mock.patch.dict(os.environ, {"TOKEN": "two words"}))
        for count in "0", "2", "x":
            (self.folder / f"{count}.csv").write_text("day,price\n1,10\n")
            (self.folder / f"{count}.csv.count").write_text(count)
        incomplete = "growing_file", "numbered_source F", "checkpoint", "changing_coin", "set_p KEY"
        more = "other_libraries", "private", "private client", "private server CERTIFICATE"
        for command, status, begin, error in (
            *((command, 2, usage, "required: ") for command in incomplete + more),
            ("private server CERTIFICATE KEY", 2, "", "TOKEN must be set to ASCII"),
            ("page --port 99999", 2, usage, "port from 0 to 65535"),
            ("events --port x", 2, usage, "invalid int value"),
            ("relay --url http://localhost", 2, usage, "the URL must"),
            ("set_p KEY 1 --url http://localhost", 2, usage, "the URL must"),
            ("growing_file .", 1, "", "Is a directory"),
            ("numbered_source ~/none price", 1, "", "No such file"),
            ("numbered_source ~/0.csv prise", 2, "", "no column 'prise'"),
            ("numbered_source ~/0.csv price --interval 0", 2, "", "interval"),
            ("numbered_source ~/x.csv price", 2, "", "must hold a count"),
            ("numbered_source ~/2.csv price", 2, "", "only 1 now"),
            ("checkpoint ~/0.csv", 2, "", "is not a checkpoint"),
            ("checkpoint ~/0.csv/file", 1, "", "Not a directory"),
        ):
            with self.subTest(command):
                words = [word.replace("~", str(self.folder)) for word in command.split()]
                await self.ends(self.start(*words), status, rf"{begin}.*: error: .*{error}.*\n")
        for count in "0", "2", "x":
            self.assertEqual((self.folder / f"{count}.csv.count").read_text(), count)
        notebook = self.start("notebook")  # which says what it is for
        await self.ends(notebook, 1, r"In a notebook: a picture(.*\n)+")

    def test_says_how_it_is_run_and_ended(self) -> None:
        """Each program has a main, and its first lines say how it is run and how it ends."""
        for path in {*RECIPES.glob("*.py")} - {RECIPES / "__init__.py", RECIPES / "notebook.py"}:
            with self.subTest(path.stem):
                text = path.read_text(encoding="utf-8")
                first = ast.get_docstring(ast.parse(text)) or ""
                self.assertRegex(text, r"\n((async )?def main\(|from client import .*\bmain\n)")
                self.assertRegex(first, rf"\n    python -m tests\.recipes\.{path.stem}\b")
                self.assertRegex(first, "Ctrl-C|ends by itself")
                if path.stem == "broker":  # or it would listen on every interface
                    self.assertRegex(first, r"\n    nats-server .*-a 127\.0\.0\.1 ")


class GrowingFileTests(RecipeCase):
    def append(self, data: bytes) -> None:
        """Write to the end of the file."""
        with self.path.open("ab") as file:
            file.write(data)

    def lines(self) -> Generator[list[str], None, None]:
        """Return what reads the lines that are new from now on."""
        lines = growing_file.new_lines(self.path)
        self.addCleanup(lines.close)
        next(lines)
        return lines

    def test_half_a_line_waits(self) -> None:
        """A line that is written in pieces, cut anywhere, is one sample; those before are none."""
        numbers = [f"line {number}" for number in range(1_000)]
        data = "\r\n".join([*numbers, ""]).encode()
        cuts = sorted({0, len(data), *random.Random(1).sample(range(len(data)), 50)})
        self.append(b"before\nli")
        lines = self.lines()
        self.append(b"ne -1\n")
        seen = next(lines)
        for start, end in itertools.pairwise(cuts):
            self.append(data[start:end])
            seen += next(lines)
        self.assertEqual(seen, ["line -1", *numbers])

    def test_truncated(self) -> None:
        """A file that was copied and truncated is read from its new start."""
        self.append(b"")
        lines = self.lines()
        for count, rest in (100, b"half a li"), (95, b""):
            self.path.write_bytes(b"".join(b"%d\n" % number for number in range(count)) + rest)
            self.assertEqual(next(lines), [str(number) for number in range(count)])

    def test_missing_and_replaced(self) -> None:
        """A file that comes later is read from its start; a renamed one to its end."""
        lines = self.lines()
        self.append(b"first\n\xff\n")
        self.assertEqual(next(lines), ["first", "\ufffd"])
        renamed = self.path.rename(self.folder / "renamed")
        self.assertEqual(next(lines), [])
        self.path.touch()  # the writer has not opened it yet
        self.assertEqual(next(lines), [])
        with renamed.open("ab") as file:
            file.write(b"last\nhalf a li")
        self.append(b"a much longer first line\n")
        self.assertEqual([*next(lines), *next(lines)], ["last", "a much longer first line"])


class SourceTests(RecipeCase):
    async def test_failed_reading(self) -> None:
        """A reading that fails, or is no JSON, is a line in the log, and the next one follows."""
        numpy = importlib.util.find_spec("numpy") and importlib.import_module("numpy")
        bad = [TimeoutError("silent"), math.nan, numpy.int64(1) if numpy else {1}]
        readings = itertools.chain([1.5, *bad, 2.5], itertools.repeat(0))
        source = mock.Mock(side_effect=readings)  # which raises what is an exception
        replaced: Any = {"WebSocketServer": self.server, "measure": source}
        self.enterContext(mock.patch.multiple(blocking_source, **replaced))
        with self.assertLogs("source", "WARNING") as logged:
            task = asyncio.ensure_future(blocking_source.follow())
            await until(lambda: self.server.end >= 2 or task.done())
            task.cancel()
            await asyncio.wait([task])
        self.assertEqual(self.server.history[:2], [1.5, 2.5])
        self.assertEqual(len(logged.output), len(bad))
        self.assertIn("no sample: TimeoutError('silent')", logged.output[0])

    async def test_listening_server(self) -> None:
        """What is wrong is refused with its reason; with key and p, every client gets the new p."""
        program = self.copy("listening_server")
        key, url = await program.line(), await program.line(1)
        recorder = self.recorder(url)
        message: Any
        wrong_p = (1007, "p must be a number from 0 to 1")
        for message, answer in (
            (f"{key} 0.5".encode(), (1003, "text only")),
            *((text, (1008, "wrong key")) for text in ("", f"{key[:-1]} 0.5", "ключ 0.5")),
            *((f"{key} {p}", wrong_p) for p in ("", "half", "1.5", "nan", "0.5 0.6")),
        ):
            with self.subTest(message):
                connection = await websocket_connect(url)
                await connection.write_message(message, binary=isinstance(message, bytes))
                while await connection.read_message() is not None:
                    pass
                connection.close()
                self.assertEqual((connection.close_code, connection.close_reason), answer)
        for word, status, log in ("a-guess", 1, "refused: 1008 wrong key\n"), (key, 0, ""):
            await self.ends(self.copy("set_p", "--url", url, word, 0), status, log)
        # By chance, with p = 0.72, that would come about once in 10 ** 11 times.
        await until(lambda: recorder.samples[-20:] == [0] * 20)
        await self.goodbye(program, recorder)

    async def test_two_streams(self) -> None:
        """Each of the two URLs leads to a stream of its own."""
        program = self.copy("two_streams")
        usual = self.recorder(url := await program.line())
        rare = self.recorder(url.replace("websocket", "rare"))
        await until(lambda: min(len(rare.samples), len(usual.samples)) >= 50)
        self.assertNotEqual(rare.epoch, usual.epoch)
        # The means of 50 samples are 0.05 and 0.72, each with an sd below 0.07.
        self.assertLess(statistics.fmean(rare.samples) + 0.2, statistics.fmean(usual.samples))
        await self.goodbye(program, usual)


class ModelTests(RecipeCase):
    def test_known_answers(self) -> None:
        """1, 2, 3, 4 have mean 10/4 and variance 5/3; far from zero it is exact, too."""
        client, distant = mean_variance.NumberClient(URL), mean_variance.NumberClient(URL)
        self.assertTrue(math.isnan(client.model.variance))
        client.on_message([1, 2])
        client.on_message([3, "4"])  # such as a line of a file
        self.assertAlmostEqual(client.model.mean, 10 / 4)
        self.assertAlmostEqual(client.model.variance, (2.25 + 0.25 + 0.25 + 2.25) / 3)
        numbers = [1e9 + random.Random(seed).gauss(0, 1) for seed in range(5_000)]
        distant.on_message(numbers)
        self.assertAlmostEqual(distant.model.variance, statistics.variance(numbers), delta=1e-6)

    def test_refused_samples(self) -> None:
        """What a model cannot take costs that sample, with a count and one line."""
        number, thermometer = mean_variance.NumberClient(URL), json_samples.Thermometers(URL)
        bad: list[Any] = ["", "n/a", "nan", "inf", "1e308", None, [], {}, 10**400]
        places: list[Any] = [1, [], {}, {"place": "roof"}, {"place": 1, "celsius": 1}]
        for client, samples, words in (
            (number, [1, *bad, 2], "refused 9 samples, the first is ''"),
            (thermometer, [*places, {"place": "roof", "celsius": 15}], "refused 5 .* first is 1"),
        ):
            with self.assertLogs("model", "WARNING") as logged:
                client.on_message(samples)
            self.assertRegex("\n".join(logged.output), rf"\AWARNING:model:{words}\Z")
        self.assertEqual((number.model.count, number.model.mean, number.refused), (2, 1.5, 9))
        self.assertEqual((thermometer.newest, thermometer.refused), (("roof", 15), 5))

    async def test_slow_work_in_order(self) -> None:
        """After a failure up to four samples come again; `stop` waits for the calls that run."""
        begun: list[int] = []
        go_on = threading.Event()
        self.addCleanup(go_on.set)

        def work(sample: int) -> int:
            begun.append(sample)
            if sample == 5 and begun.count(5) == 1:
                raise OSError("no connection to the database")
            if sample >= 8:
                go_on.wait(TIMEOUT)
            return sample

        self.server.send_message([*range(240)])
        self.enterContext(mock.patch.object(slow_work, "work", work))
        client = slow_work.SlowClient(self.url, 0.01)
        with self.assertLogs() as logged:
            client.start()
            await until(lambda: {*range(12)} <= {*begun})
            self.assertEqual((begun.count(0), begun.count(5)), (1, 2))
            stopping = asyncio.ensure_future(asyncio.to_thread(client.stop))
            await until(lambda: client.stopping)
            go_on.set()
            await stopping
            self.assertEqual(({*begun}, client.position), ({*range(12)}, 12))
            client.start()
            await until(lambda: client.position == 240)
            await asyncio.to_thread(client.stop)
        results = [record.getMessage() for record in logged.records if record.name == "work"]
        self.assertEqual((results, client.missed), ([*map(str, range(240))], 0))

    async def test_relay(self) -> None:
        """The posterior is a stream and a page, and survives a restart of the first server."""
        program = self.copy("relay", "--url", self.url)
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
        await until(lambda: handler.close_code == 1000)

    async def test_result_that_is_no_json(self) -> None:
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


@needs("trustme")
class PrivateTests(RecipeCase):
    async def test_both_programs(self) -> None:
        """Only who has the token gets the stream, and neither side logs a token."""
        trustme = importlib.import_module("trustme")
        authority = trustme.CA()
        issued = authority.issue_cert("localhost", "127.0.0.1")
        authority.cert_pem.write_to_path(ca := self.folder / "ca")
        issued.private_key_and_cert_chain_pem.write_to_path(own := self.folder / "own")
        self.enterContext(mock.patch.dict(os.environ, {"TOKEN": "t0ken\n"}))
        server = self.start("private", "server", own, own, "--port", 0)
        url = await server.line()
        self.assertRegex(url, "^wss://")
        for headers, reason in (
            ([], "no token"),
            (["Bearer t0kenx"], "wrong token"),
            (["t0ken"], "wrong token"),
            (["Bearer t0ken\u00e9"], "wrong token"),
            (["Bearer t0ken"] * 2, "more than one token"),
        ):
            request = HTTPRequest(url, ca_certs=str(ca))
            for header in headers:
                request.headers.add("Authorization", header)
            with self.subTest(reason), self.assertRaises(HTTPClientError) as refused:
                await websocket_connect(request)
            self.assertEqual((refused.exception.code, refused.exception.message), (401, reason))
        plain = self.start("private", "client", ca, self.url)
        await self.ends(plain, 2, ".*error: the URL must begin with wss://.*\n")
        self.assertFalse(self.server.clients)
        client = self.copy("private", "client", ca, url)
        os.environ["TOKEN"] = "t0ken-of-another"
        stranger = self.start("private", "client", ca, url)
        await until(lambda: re.search(r"Beta\(\d\d", client.out()))
        await until(lambda: "HTTP 401: wrong token; next" in stranger.err())
        await self.interrupt(server)
        await until(lambda: "1001 'going away'" in client.err())
        await self.interrupt(client, stranger)
        for program in server, client, stranger:
            self.assertNotIn("t0ken", program.out() + program.err())
        self.assertIn("401 GET", server.err())
        taken = self.start("private", "server", own, own, "--port", self.port)
        await self.ends(taken, 1, r"cannot serve on .*\n")
