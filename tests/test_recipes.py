"""What the recipes promise: each is run as a program beside copies of the two scripts."""

import asyncio
import contextlib
import datetime
import importlib.util
import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import unittest
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
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
    private,
    relay,
    slow_work,
)
from tests.support import (
    ROOT,
    TIMEOUT,
    PairCase,
    Recorder,
    first_line,
    free_port,
    fresh_server,
    until,
)


class RecipeCase(PairCase):
    """A test that runs recipes as programs."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.log = self.folder / "log"  # what the last program wrote to standard error

    @contextlib.contextmanager
    def program(self, name: str, *options: str, port: int = 0) -> Iterator[subprocess.Popen[str]]:
        """Run a recipe beside copies of the two scripts, on a free port instead of 8765 or 8766."""
        for source in ("server.py", "client.py", f"tests/recipes/{name}.py"):
            text = (ROOT / source).read_text(encoding="utf-8")
            text = text.replace("8765", str(port)).replace("8766", "0")
            (self.folder / Path(source).name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-W", "error", str(self.folder / f"{name}.py"), *options]
        pipe = subprocess.PIPE
        # From another folder: a recipe finds what it needs beside itself.
        with (
            self.log.open("w") as log,
            subprocess.Popen(
                command, stdout=pipe, stderr=log, text=True, cwd=self.folder.parent
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    async def line(self, process: subprocess.Popen[str]) -> str:
        """Read a program's next line while the event loop goes on."""
        return await asyncio.to_thread(first_line, process)

    async def interrupt(self, process: subprocess.Popen[str]) -> None:
        """Press Ctrl-C, and check that the program ends quietly."""
        process.send_signal(signal.SIGINT)
        self.assertEqual(await asyncio.to_thread(process.wait, TIMEOUT), 0)
        self.assertNotIn("Traceback", self.log.read_text())

    async def goodbye(self, process: subprocess.Popen[str], recorder: Recorder) -> None:
        """Press Ctrl-C, and check that the client of the stream is told."""
        with self.assertLogs("client", "WARNING") as logged:
            await self.interrupt(process)
            await until(lambda: logged.output)
            recorder.stop()
        self.assertIn("closed by the server: 1001 'going away'", logged.output[0])

    def recorder(self, url: str) -> Recorder:
        """Follow a stream."""
        client = Recorder(url)
        self.follow(client)
        return client


class UsageTests(unittest.TestCase):
    """All recipes that take arguments."""

    def test_missing_argument(self) -> None:
        """From the root, a recipe without its arguments says how it is used, with status 2."""
        for name in ("growing_file", "set_p", "private", "private client"):
            command = [sys.executable, "-m", *f"tests.recipes.{name}".split()]
            with self.subTest(name):
                done = subprocess.run(
                    command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=60
                )
                self.assertEqual((done.returncode, done.stdout), (2, ""))
                self.assertRegex(done.stderr, r"\Ausage: .*\n(.*\n)*.*: error: .*required")


class GrowingFileTests(RecipeCase):
    """growing_file.py."""

    def setUp(self) -> None:
        super().setUp()
        self.path = self.folder / "measurements.txt"

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
        renamed = self.path.rename(self.folder / "measurements.1")
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

    @gen_test
    async def test_program(self) -> None:
        """The lines come to a client, which is told at Ctrl-C."""
        self.append(b"before\n")
        with self.program("growing_file", str(self.path)) as process:
            samples = (recorder := self.recorder(await self.line(process))).samples
            await until(lambda: recorder.epoch)
            self.append(b"1\r\n\n2\n")
            await until(lambda: len(samples) == 3)
            self.assertEqual(samples, ["1", "", "2"])
            await self.goodbye(process, recorder)


class BlockingSourceTests(RecipeCase):
    """blocking_source.py."""

    @gen_test
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

    @gen_test
    async def test_program(self) -> None:
        """Readings come, and Ctrl-C waits for the current one and tells the client."""
        with self.program("blocking_source") as process:
            recorder = self.recorder(await self.line(process))
            await until(lambda: len(recorder.samples) > 1)
            self.assertAlmostEqual(recorder.samples[0], 20, delta=10)  # 20 standard deviations
            await self.goodbye(process, recorder)


class MeanVarianceTests(RecipeCase):
    """mean_variance.py."""

    def setUp(self) -> None:
        super().setUp()
        self.client = mean_variance.NumberClient(self.url, 0.01)

    def test_known_answer(self) -> None:
        """1, 2, 3, 4 have mean 10/4 and variance (2.25 + 0.25 + 0.25 + 2.25)/3 = 5/3."""
        self.assertTrue(math.isnan(self.client.model.variance))
        self.client.on_message([1, 2])
        self.client.on_message([3, "4"])  # such as a line of a file
        self.assertAlmostEqual(self.client.model.mean, 10 / 4)
        self.assertAlmostEqual(self.client.model.variance, 5 / 3)

    def test_numbers_far_from_zero(self) -> None:
        """The result agrees with the statistics module where a sum of squares would not."""
        dice = random.Random(1)
        numbers = [1e9 + dice.gauss(0, 1) for _ in range(5_000)]
        self.client.on_message(numbers)
        variance = statistics.variance(numbers)
        self.assertAlmostEqual(self.client.model.variance, variance, delta=1e-6)

    @gen_test
    async def test_refused_samples(self) -> None:
        """What is no finite number costs that sample, with a count and one line."""
        self.follow(self.client)
        bad: list[Any] = ["", "n/a", "nan", "inf", "1e308", None, [], {}, 10**400]
        with self.assertLogs("model", "WARNING") as logged:
            self.server.send_message([1, *bad, 2])
            await until(lambda: self.client.position == 11)
        self.assertEqual(logged.output, ["WARNING:model:refused 9 samples, the first is ''"])
        model = self.client.model
        self.assertEqual((model.count, model.mean, self.client.refused), (2, 1.5, 9))

    @gen_test
    async def test_program(self) -> None:
        """The program prints the model once a second."""
        self.server.send_message([1, 2, "x", 3, 4])
        with self.program("mean_variance", "--url", self.url) as process:
            while (printed := await self.line(process)).startswith("0"):
                pass
            expected = "4 samples  mean 2.5  variance 1.66667  missed 0  refused 1"
            self.assertEqual(printed, expected)
            await self.interrupt(process)


class JsonSamplesTests(RecipeCase):
    """json_samples.py."""

    def test_refused_samples(self) -> None:
        """What is no measurement costs that sample, with a count and one line."""
        client = json_samples.Thermometers(self.url)
        bad: list[Any] = [1, [], {}, {"place": "roof"}, {"place": 1, "celsius": 1}]
        with self.assertLogs("model", "WARNING") as logged:
            client.on_message([*bad, {"place": "roof", "celsius": 15, "more": None}])
        self.assertEqual(logged.output, ["WARNING:model:refused 5 samples, the first is 1"])
        self.assertEqual((client.newest, client.refused), (("roof", 15), 5))

    @gen_test
    async def test_program(self) -> None:
        """The client of the program shows what its server has sent, and another gets the same."""
        with self.program("json_samples", port=free_port()) as process:
            recorder = self.recorder(await self.line(process))
            while (shown := await self.line(process)) == "None":
                pass
            await until(lambda: recorder.samples)
            self.assertIn(shown, [str((s["place"], s["celsius"])) for s in recorder.samples])
            await self.goodbye(process, recorder)


class SlowWorkTests(RecipeCase):
    """slow_work.py."""

    def start(self, work: Any) -> slow_work.SlowClient:
        """Follow the stream in a thread, with this work on each sample."""
        self.enterContext(mock.patch.object(slow_work, "work", work))
        client = slow_work.SlowClient(self.url, 0.01)
        client.start()
        return client

    @gen_test
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
            client = self.start(work)
            await until(lambda: len(begun) == 8)
            stopping = asyncio.ensure_future(asyncio.to_thread(client.stop))
            await until(lambda: client.stopping)
            go_on.set()
            await stopping
            self.assertEqual((sorted(begun), client.position), ([*range(8)], 8))
            client.start()
            await until(lambda: client.position == 240)
            await asyncio.to_thread(client.stop)
        self.assertEqual(
            [record.getMessage() for record in logged.records], [*map(str, range(240))]
        )

    @gen_test
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
            client = self.start(work)
            await until(lambda: client.position == 10 and 9 in tried)
            await asyncio.to_thread(client.stop)
        self.assertEqual((tried.count(0), tried.count(5)), (1, 2))
        results = [record.getMessage() for record in logged.records if record.name == "work"]
        self.assertEqual((results, client.missed), ([*map(str, range(10))], 0))

    @gen_test
    async def test_program(self) -> None:
        """Results are in the log, and Ctrl-C closes the connection."""
        self.server.send_message([*range(240)])
        with self.program("slow_work", "--url", self.url) as process:
            await until(lambda: "3 is done" in self.log.read_text())
            (handler,) = self.server.clients
            await self.interrupt(process)
            await until(lambda: not self.server.clients)
            self.assertEqual(handler.close_code, 1000)
            self.assertNotIn("100 is done", self.log.read_text())


class RelayTests(RecipeCase):
    """relay.py."""

    @gen_test
    async def test_program(self) -> None:
        """The posterior is a stream and a page, and stays as it is when the first server restarts."""
        with self.program("relay", "--url", self.url) as process:
            url = await self.line(process)
            results = self.recorder(url)
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
            await self.goodbye(process, results)

    @gen_test
    async def test_sample_that_is_no_json(self) -> None:
        """A result that cannot be sent changes nothing: no sample is counted twice."""
        now: list[Any] = [datetime.datetime(2026, 1, 1)] * 3
        summary = lambda posterior: {"time": now.pop() if now else 0, "posterior": [*posterior]}
        results = fresh_server()
        client = relay.Relay(self.url, 0.01)
        self.enterContext(mock.patch.object(relay, "WebSocketServer", results))
        self.enterContext(mock.patch.object(relay, "summary", summary))
        with self.assertLogs("client", "WARNING"):
            self.follow(client)
            self.server.send_message([1, 1, 0])
            await until(lambda: results.history)
        self.assertEqual(results.history, [{"time": 0, "posterior": [3, 2]}])


class ListeningServerTests(RecipeCase):
    """listening_server.py and set_p.py."""

    @gen_test
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

    @gen_test
    async def test_both_programs(self) -> None:
        """The client sets p to 0, and from then on every client gets 0s only; a stranger does not."""
        with self.program("listening_server") as process:
            key, url = await self.line(process), await self.line(process)
            recorder = self.recorder(url)
            set_p = [sys.executable, "-W", "error", "-m", "tests.recipes.set_p", "--url", url]
            for arguments, status, told in [
                (["a-guess", "1"], 1, "refused: 1008 wrong key\n"),
                ([key, "-0.1"], 1, "refused: 1007 p must be a number from 0 to 1\n"),
                ([key, "0"], 0, ""),
            ]:
                done = await asyncio.to_thread(
                    subprocess.run,
                    [*set_p, *arguments],
                    check=False,
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                )
                self.assertEqual((done.returncode, done.stderr), (status, told))
            # By chance, with p = 0.72, that would come about once in 10 ** 11 times.
            await until(lambda: recorder.samples[-20:] == [0] * 20)
            await self.goodbye(process, recorder)


class TwoStreamsTests(RecipeCase):
    """two_streams.py."""

    @gen_test
    async def test_program(self) -> None:
        """Each URL that is printed leads to a stream of its own."""
        with self.program("two_streams", port=free_port()) as process:
            rare, usual = [self.recorder(await self.line(process)) for _ in range(2)]
            await until(lambda: min(len(rare.samples), len(usual.samples)) >= 50)
            self.assertNotEqual(rare.epoch, usual.epoch)
            # The means of 50 samples are 0.05 and 0.72, each with an sd below 0.07.
            self.assertLess(statistics.fmean(rare.samples) + 0.2, statistics.fmean(usual.samples))
            await self.goodbye(process, usual)


@unittest.skipUnless(importlib.util.find_spec("trustme"), "needs trustme: see requirements.txt")
class PrivateTests(RecipeCase):
    """private.py."""

    def setUp(self) -> None:
        super().setUp()
        import trustme

        authority = trustme.CA()
        certificate = authority.issue_cert("localhost", "127.0.0.1")
        self.key, self.certificate = self.folder / "key.pem", self.folder / "cert.pem"
        certificate.private_key_pem.write_to_path(str(self.key))
        certificate.cert_chain_pems[0].write_to_path(str(self.certificate))
        authority.cert_pem.write_to_path(str(self.certificate.with_suffix(".ca")))

    @gen_test
    async def test_program(self) -> None:
        """Only who has the token gets the stream, and neither side logs a token."""
        token, authority = "t0ken-" + "x" * 20, str(self.certificate.with_suffix(".ca"))
        files = [str(self.certificate), str(self.key)]
        self.enterContext(mock.patch.dict(os.environ, {"TOKEN": token + "\n"}))
        with self.program("private", "server", *files, "--port", "0") as process:
            url = await self.line(process)
            self.assertRegex(url, "^wss://")
            for headers, reason in [
                ([], "no token"),
                ([f"Bearer {token}x"], "wrong token"),
                ([token], "wrong token"),
                ([f"Bearer {token}\u00e9"], "wrong token"),
                ([f"Bearer {token}"] * 2, "more than one token"),
            ]:
                request = HTTPRequest(url, ca_certs=authority)
                for header in headers:
                    request.headers.add("Authorization", header)
                with self.subTest(reason), self.assertRaises(HTTPClientError) as refused:
                    await websocket_connect(request)
                self.assertEqual((refused.exception.code, refused.exception.message), (401, reason))
            client = private.PrivateClient(url, token, authority, 0.01)
            with self.assertLogs("client", "INFO") as logged:
                self.follow(client)
                await until(lambda: client.position > 2)
                client.stop()
                await self.interrupt(process)
        self.assertNotIn("t0ken", self.log.read_text() + "".join(logged.output))
        self.assertIn("401 GET", self.log.read_text())

    def test_unencrypted_url(self) -> None:
        """The client refuses a ws:// URL before anything is sent."""
        with self.assertRaisesRegex(ValueError, "wss://"):
            private.PrivateClient("ws://localhost/websocket", "token", "cert.pem")


if __name__ == "__main__":
    unittest.main()
