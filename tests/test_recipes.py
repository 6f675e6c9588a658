"""What the recipes of README.md promise: each block is taken out of it and run as it stands."""

import ast
import asyncio
import contextlib
import importlib.util
import io
import itertools
import json
import logging
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
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tornado.httpclient import AsyncHTTPClient
from tornado.testing import gen_test
from tornado.websocket import WebSocketClientConnection, websocket_connect

from client import WebSocketClient
from server import make_app
from tests.support import (
    ROOT,
    TIMEOUT,
    PairCase,
    Recorder,
    Tracebacks,
    accepts,
    first_line,
    free_port,
    fresh_server,
    readme_blocks,
    running,
    until,
    wait_until,
)

RECIPES = (
    "Your own data",
    "Your own model",
    "Slow work per message",
    "In a notebook",
    "Pass it on",
    "Listen, too",
)


def block(heading: str, number: int = 0, **ports: int) -> str:
    """Return a block of the README, with its ports (p8765=...) replaced by those of a test."""
    code = readme_blocks(heading, "python")[number]
    for name in ports:
        if name[1:] not in code:
            raise AssertionError(f"there is no port {name[1:]} in {heading!r}")
    # In one go, since a test's port may have the digits of the next one in it.
    literal = "|".join(name[1:] for name in ports)
    return re.sub(literal, lambda found: str(ports[f"p{found[0]}"]), code) if ports else code


def load(heading: str, number: int = 0) -> dict[str, Any]:
    """Execute a block as if it were imported, and return its names."""
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(block(heading, number), f"README.md, {heading}", "exec"), names)  # noqa: S102
    return names


@contextlib.contextmanager
def program(code: str, *options: str, stderr: str = "") -> Iterator[subprocess.Popen[str]]:
    """Run a block as a program, as a user would, and check what it wrote to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.py")
        path.write_text(code, encoding="utf-8")
        with subprocess.Popen(
            [sys.executable, "-W", "error", str(path), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        ) as process:
            try:
                yield process
            finally:
                process.kill()
            assert process.stderr is not None
            written = process.stderr.read()
            if not re.fullmatch(stderr, written, re.DOTALL):
                raise AssertionError(f"standard error:\n{written}")


def line(process: subprocess.Popen[str]) -> "asyncio.Future[str]":
    """Read the next line of a program's output, while the event loop goes on."""
    return asyncio.ensure_future(asyncio.to_thread(first_line, process))


class ServerRecipeCase(unittest.TestCase):
    """A test of a recipe that serves: its program is followed from this process."""

    def setUp(self) -> None:
        self.tracebacks = Tracebacks()
        logging.getLogger().addHandler(self.tracebacks)
        self.port = free_port()

    def tearDown(self) -> None:
        logging.getLogger().removeHandler(self.tracebacks)
        self.assertEqual(self.tracebacks.found, [])

    @contextlib.contextmanager
    def recorder(self) -> Iterator[Recorder]:
        """Follow the recipe's stream in the background, once it is there."""
        wait_until(lambda: accepts(self.port))  # or the client's waits would grow meanwhile
        client = Recorder(f"ws://localhost:{self.port}/websocket")
        client.start()
        try:
            wait_until(lambda: client.epoch)
            yield client
        finally:
            client.stop()


class RecipeTests(unittest.TestCase):
    """All recipes together."""

    def test_blocks_are_short(self) -> None:
        """No block has more than 25 lines of code, none of which is too wide for the page."""
        for heading in RECIPES:
            for code in readme_blocks(heading, "python"):
                lines = [line for line in code.splitlines() if line]
                with self.subTest(heading, first=lines[0]):
                    self.assertLessEqual(len(lines), 25)
                    self.assertLessEqual(max(map(len, lines)), 100)


@unittest.skipUnless(
    importlib.util.find_spec("watchdog"), "needs watchdog: see tests/requirements.txt"
)
class GrowingFileTests(ServerRecipeCase):
    """Your own data: a file that grows."""

    def setUp(self) -> None:
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name, "measurements.txt")
        self.path.write_bytes(b"")

    def append(self, data: bytes) -> None:
        """Write to the end of the file at once."""
        with self.path.open("ab", buffering=0) as file:
            file.write(data)

    @contextlib.contextmanager
    def streamed(self) -> Iterator[list[Any]]:
        """Run the recipe, and collect the samples of its stream."""
        code = block("Your own data", p8765=self.port)
        with program(code, str(self.path)), self.recorder() as client:
            yield client.samples

    def test_lines_that_end_from_now_on(self) -> None:
        """Lines that were there before are not sent; one that was unfinished comes whole."""
        self.append(b"before\nunfin")
        with self.streamed() as samples:
            self.append(b"ished\nafter\n")
            wait_until(lambda: "after" in samples)
            self.assertEqual(samples, ["unfinished", "after"])

    def test_unfinished_line_waits(self) -> None:
        """A line that is written in pieces is one sample, sent when its end has come."""
        with self.streamed() as samples:
            self.append(b"first\nsec")
            wait_until(lambda: samples)
            self.assertEqual(samples, ["first"])
            self.append(b"ond")
            self.append(b"\nthird\n")
            wait_until(lambda: "third" in samples)
            self.assertEqual(samples, ["first", "second", "third"])

    def test_every_line_once_in_order(self) -> None:
        """Lines that are written in pieces, cut anywhere, come once each and in order."""
        lines = [f"line {number}" for number in range(1_000)]
        data = "\n".join([*lines, ""]).encode()
        dice = random.Random(1)
        cuts = sorted({0, len(data), *dice.sample(range(len(data)), 50)})
        with self.streamed() as samples:
            for start, end in itertools.pairwise(cuts):
                self.append(data[start:end])
                written = data[:end].count(b"\n")
                wait_until(lambda: len(samples) >= written)  # noqa: B023
            self.assertEqual(samples, lines)

    def test_bytes_that_are_no_text(self) -> None:
        """What is not UTF-8 is replaced, and the stream goes on."""
        with self.streamed() as samples:
            self.append("21.5 °C\n".encode() + b"\xff\nnext\n")
            wait_until(lambda: "next" in samples)
            self.assertEqual(samples, ["21.5 °C", "\ufffd", "next"])

    @contextlib.asynccontextmanager
    async def inside(self) -> AsyncIterator[SimpleNamespace]:
        """Run the recipe in this process, and tell which threads read the file and send samples."""
        seen = SimpleNamespace(samples=[], readers=[], senders=set())
        listening = asyncio.Event()

        def send_message(samples: list[str]) -> None:
            seen.samples += samples
            seen.senders.add(threading.get_ident())

        def read() -> bytes:
            seen.readers.append(threading.get_ident())
            return file.read()

        names = load("Your own data")
        names["make_app"] = lambda: SimpleNamespace(listen=lambda *_: listening.set())
        names["WebSocketServer"] = SimpleNamespace(send_message=send_message)
        with self.path.open("rb") as file:
            spy = SimpleNamespace(name=file.name, seek=file.seek, tell=file.tell, read=read)
            task = asyncio.create_task(names["main"](spy))
            await until(listening.is_set)
            yield seen
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def test_samples_enter_in_the_loop(self) -> None:
        """The file is read in another thread, but the samples are sent in the event loop's own."""

        async def scenario() -> None:
            async with self.inside() as seen:
                self.append(b"one\n")
                await until(lambda: seen.samples)
            here = threading.get_ident()
            self.assertEqual(seen.senders, {here})
            self.assertNotIn(here, seen.readers[1:])  # the first time is before it serves

        asyncio.run(scenario())

    def test_truncated_file_falls_silent(self) -> None:
        """After a truncation nothing comes until the file is longer than it ever was."""

        async def scenario() -> None:
            async with self.inside() as seen:
                self.append(b"0123456789\n")
                await until(lambda: seen.samples)
                reads = len(seen.readers)
                os.truncate(self.path, 0)
                await until(lambda: len(seen.readers) > reads)
                self.append(b"eleven too\nlonger\n")
                await until(lambda: "longer" in seen.samples)
                self.assertEqual(seen.samples, ["0123456789", "longer"])

        asyncio.run(scenario())

    def test_replaced_file_is_not_followed(self) -> None:
        """After a log rotation lines come from the renamed file, and none from the new one."""
        with self.streamed() as samples:
            renamed = self.path.rename(self.path.with_suffix(".1"))
            self.append(b"lost\n")
            with renamed.open("ab") as file:
                file.write(b"last\n")
            wait_until(lambda: samples)
            self.assertEqual(samples, ["last"])

    def test_ends_at_ctrl_c(self) -> None:
        """Ctrl-C ends the program, watchdog's threads included."""
        code = block("Your own data", p8765=self.port)
        told = ".*KeyboardInterrupt\n"
        with program(code, str(self.path), stderr=told) as process, self.recorder():
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(TIMEOUT), -signal.SIGINT)


class BlockingSourceTests(ServerRecipeCase):
    """Your own data: a source that blocks."""

    def test_samples_come(self) -> None:
        """What the source returns is a sample."""
        with program(block("Your own data", 1, p8765=self.port)), self.recorder() as client:
            wait_until(lambda: len(client.samples) > 1)
            for sample in client.samples:
                self.assertAlmostEqual(sample, 20, delta=10)  # 20 standard deviations

    def test_loop_is_free(self) -> None:
        """A client is welcomed while the source is silent."""
        code = block("Your own data", 1, p8765=self.port)
        self.assertIn("sleep(0.5)", code)
        with program(code.replace("sleep(0.5)", "sleep(3600)")), self.recorder() as client:
            self.assertEqual((client.position, client.samples), (0, []))

    def test_ends_at_ctrl_c(self) -> None:
        """Ctrl-C ends the program, once the source has answered."""
        code = block("Your own data", 1, p8765=self.port)
        with program(code, stderr=".*KeyboardInterrupt\n") as process, self.recorder():
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(TIMEOUT), -signal.SIGINT)


class MeanVarianceTests(PairCase):
    """Your own model: a running mean and variance."""

    def setUp(self) -> None:
        super().setUp()
        self.client = load("Your own model")["NumberClient"](self.url, 0.01)

    @gen_test
    async def test_agrees_with_the_statistics_module(self) -> None:
        """Numbers far from 0 and close to each other do not cancel out."""
        dice = random.Random(1)
        numbers = [1e9 + dice.gauss(0, 1) for _ in range(5_000)]
        self.follow(self.client)
        await until(lambda: self.client.epoch)
        for start in range(0, len(numbers), 100):
            self.server.send_message(numbers[start : start + 100])
            await asyncio.sleep(0)  # so that it comes in several messages
        await until(lambda: self.client.position == len(numbers))
        model = self.client.model
        self.assertEqual(model.count, len(numbers))
        self.assertAlmostEqual(model.mean, statistics.fmean(numbers), delta=1e-6)
        self.assertAlmostEqual(model.variance, statistics.variance(numbers), delta=1e-6)

    def test_known_answer(self) -> None:
        """1, 2, 3, 4 have mean 10/4 and variance (2.25 + 0.25 + 0.25 + 2.25)/3 = 5/3."""
        self.client.on_message([1, 2])
        self.client.on_message([3, "4"])  # a line of a file, for example
        self.assertAlmostEqual(self.client.model.mean, 10 / 4)
        self.assertAlmostEqual(self.client.model.variance, 5 / 3)

    def test_few_samples(self) -> None:
        """There is no variance before the second sample."""
        self.assertTrue(math.isnan(self.client.model.variance))
        self.client.on_message([7])
        self.assertTrue(math.isnan(self.client.model.variance))
        self.assertEqual(self.client.model.mean, 7)

    def test_all_or_nothing(self) -> None:
        """A message that cannot be used leaves the model as it was, for it comes again."""
        self.client.on_message([1, 2])
        before = self.client.model
        bad: Any
        for bad in ("seven", None, [], {}):
            with self.subTest(bad), self.assertRaises((ValueError, TypeError)):
                self.client.on_message([3, 4, bad])
            self.assertIs(self.client.model, before)

    def test_nan_stays(self) -> None:
        """One nan makes the mean and the variance nan for good."""
        self.client.on_message(["nan", 1, 2])
        self.assertTrue(math.isnan(self.client.model.mean))
        self.assertTrue(math.isnan(self.client.model.variance))

    @gen_test
    async def test_program(self) -> None:
        """Run as it stands, the block prints the model."""
        self.server.send_message([1, 2, 3, 4])
        with program(block("Your own model", p8765=self.port)) as process:
            printed = ""
            while "count=4" not in printed:
                printed = await line(process)
            self.assertIn("mean=2.5", printed)
            self.assertAlmostEqual(float(printed.split()[-1]), 5 / 3)


class AnyJsonTests(ServerRecipeCase):
    """Your own model: any JSON as a sample."""

    def test_both_ends(self) -> None:
        """What the client of the program shows is a sample that its server has sent."""
        code = block("Your own model", 1, p8765=self.port)
        with program(code) as process, self.recorder() as client:
            shown = ""
            while not shown.startswith("("):
                shown = first_line(process)
            newest = ast.literal_eval(shown)
            wait_until(lambda: newest in [(s["place"], s["celsius"]) for s in client.samples])

    def test_what_is_understood(self) -> None:
        """A measurement is taken, with a whole number or not; anything else is a ValueError."""
        client = load("Your own model", 1)["Thermometers"]("ws://localhost:1/")
        for celsius in (15, 15.5):
            client.on_message([{"place": "roof", "celsius": celsius, "more": None}])
            self.assertEqual(client.newest, ("roof", celsius))
        bad: Any
        for bad in (1, [], {}, {"place": "roof"}, {"place": 1, "celsius": 1}):
            with self.subTest(bad), self.assertRaisesRegex(ValueError, "not a measurement"):
                client.on_message([bad])


class LongSampleTests(PairCase):
    """Your own model: the limit of long samples."""

    @gen_test
    async def test_history_in_one_message(self) -> None:
        """Ten MiB of history do not reach a client, and a shorter history does."""
        client = Recorder(self.url)
        self.server.send_message(["x" * 1_000_000] * 11)
        self.follow(client)
        with self.assertLogs("client", "WARNING"):
            await until(lambda: client._attempt > 1)
        self.assertEqual(client.samples, [])
        self.server.history_size = 5
        self.server.send_message(["y"])
        await until(lambda: client.samples)
        self.assertEqual((len(client.samples), client.samples[-1]), (5, "y"))


class SlowWorkTests(PairCase):
    """Slow work per message."""

    def setUp(self) -> None:
        super().setUp()
        self.names = load("Slow work per message")
        self.names["print"] = lambda *results, **_: self.results.extend(results)
        self.results: list[Any] = []
        self.client: WebSocketClient = self.names["SlowClient"](self.url, 0.01)

    @contextlib.asynccontextmanager
    async def started(self, work: Callable[[Any], Any]) -> AsyncIterator[None]:
        """Follow the stream in the client's own thread, with this work to do on a sample."""
        self.names["work"] = work
        self.client.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self.client.stop)

    @gen_test
    async def test_results_in_order(self) -> None:
        """Samples are worked on at the same time, and the results are in order all the same."""
        done = [threading.Event() for _ in range(5)]

        def backwards(sample: int) -> int:
            self.assertTrue(done[sample + 1].wait(TIMEOUT))
            done[sample].set()
            return sample

        done[4].set()
        async with self.started(backwards):
            self.server.send_message([0, 1, 2, 3])
            await until(lambda: self.results)
        self.assertEqual(self.results, [0, 1, 2, 3])

    @gen_test
    async def test_stream_waits(self) -> None:
        """While the work lasts the server stops writing, this loop goes on, and nothing is lost."""
        begun: list[str] = []
        go_on = threading.Event()

        def work(sample: str) -> str:
            begun.append(sample)
            go_on.wait(TIMEOUT)
            return sample

        sent: list[str] = []

        def send() -> None:
            sent.append(f"{len(sent):<100000}")  # 100 kB: the kernel's buffers are soon full
            self.server.send_message(sent[-1:])

        async with self.started(work):
            try:
                await until(lambda: self.server.clients)
                (handler,) = self.server.clients
                send()
                await until(lambda: begun)
                turns = 0
                while turns < 50:  # of the event loop without progress: the kernel takes no more
                    if not handler.writing:
                        send()
                        turns = 0
                        self.assertLess(len(sent), 1_000)
                    await asyncio.sleep(0.005)
                    turns += 1
                written = handler.position
                for _ in range(5):
                    send()
                    await asyncio.sleep(0.005)
                self.assertEqual(handler.position, written)
                self.assertEqual(begun, sent[:1])
            finally:
                go_on.set()
            await until(lambda: len(self.results) == len(sent))
        self.assertEqual(self.results, sent)
        self.assertEqual(self.client.missed, 0)

    @gen_test
    async def test_work_that_fails_is_done_again(self) -> None:
        """After an exception no result is kept, and every sample of the message comes again."""
        tried: list[int] = []

        def work(sample: int) -> int:
            tried.append(sample)
            if sample == 1 and tried.count(1) == 1:
                raise OSError("no connection to the database")
            return sample

        with self.assertLogs("client", "ERROR") as logged:
            async with self.started(work):
                self.server.send_message([0, 1, 2])
                await until(lambda: self.results)
        self.assertEqual(self.results, [0, 1, 2])
        self.assertEqual((tried.count(0), tried.count(1)), (2, 2))
        self.assertEqual([record.message for record in logged.records], ["on_message failed"])
        self.assertEqual((self.client.position, self.client.missed), (3, 0))

    @gen_test
    async def test_work_that_outlasts_the_ping_timeout(self) -> None:
        """The server takes the client for dead, which comes back for the next message."""
        application: Any = self.http_server.request_callback
        application.settings.update(websocket_ping_interval=0.1, websocket_ping_timeout=0.1)
        left = threading.Event()

        def work(sample: int) -> int:
            left.wait(TIMEOUT)
            return sample

        async with self.started(work):
            await until(lambda: self.server.clients)
            self.server.send_message([0])
            await until(lambda: not self.server.clients)
            self.server.send_message([1])
            left.set()
            await until(lambda: len(self.results) == 2)
        self.assertEqual(self.results, [0, 1])
        self.assertEqual(self.client.missed, 0)

    @gen_test
    async def test_program(self) -> None:
        """Run as it stands, the block prints the results, and Ctrl-C closes the connection."""
        self.server.send_message([5, 6, 7, 8, 9])
        code = block("Slow work per message", p8765=self.port)
        with program(code, stderr=".*KeyboardInterrupt\n") as process:
            for sample in (5, 6, 7, 8, 9):
                self.assertEqual(await line(process), f"{sample} is done")
            (handler,) = self.server.clients
            process.send_signal(signal.SIGINT)
            status = await asyncio.to_thread(process.wait, TIMEOUT)
            self.assertEqual(status, -signal.SIGINT)
            await until(lambda: not self.server.clients)
            self.assertEqual(handler.close_code, 1000)


def cells() -> list[str]:
    """Return the cells of the notebook recipe."""
    return re.split(r"^(?=# %%)", block("In a notebook"), flags=re.MULTILINE)[1:]


class NotebookTests(unittest.IsolatedAsyncioTestCase):
    """In a notebook: cells that are run inside an event loop, as a kernel does."""

    def setUp(self) -> None:
        process = self.enterContext(running("server.py", "--port", "0", "--interval", "10"))
        self.url = first_line(process)
        self.cells = [
            cell.replace("ws://localhost:8765/websocket", self.url)  # its port is a free one
            for cell in cells()
        ]

    async def test_posterior_moves(self) -> None:
        """The posterior moves between two looks at it, and no longer after the last cell."""
        start, look, stop = self.cells
        names: dict[str, Any] = {}
        # The last cell waits, which asyncio's debug mode would remark upon.
        asyncio.get_running_loop().slow_callback_duration = TIMEOUT

        def run(cell: str) -> str:
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(cell, names)  # noqa: S102
            return printed.getvalue()

        run(start)
        try:
            await until(lambda: names["client"].posterior.trials)
            seen = run(look)
            self.assertRegex(seen, r"\ABeta\(\d+, \d+\)  mean .*\n.{60}\n\Z")
            posterior, _ = seen.splitlines()
            await until(lambda: posterior not in run(look))
        finally:
            run(stop)
        trials = names["client"].posterior.trials
        self.assertEqual(names["client"].position, trials)
        self.assertEqual([t for t in threading.enumerate() if "_listen" in t.name], [])
        run(start)  # a second round
        await until(lambda: names["client"].posterior.trials)
        run(stop)

    async def test_first_cell_twice(self) -> None:
        """The first cell, run again without the last one, leaves the first client running."""
        start, _, stop = self.cells
        asyncio.get_running_loop().slow_callback_duration = TIMEOUT
        names: dict[str, Any] = {}
        exec(start, names)  # noqa: S102
        nameless = names["client"]
        exec(start, names)  # noqa: S102
        exec(stop, names)  # noqa: S102
        position = nameless.position
        await until(lambda: nameless.position > position)
        nameless.stop()


@unittest.skipUnless(
    importlib.util.find_spec("ipykernel") and importlib.util.find_spec("jupyter_client"),
    "needs ipykernel and jupyter_client: see tests/requirements.txt",
)
class KernelTests(unittest.TestCase):
    """In a notebook: a real kernel."""

    def setUp(self) -> None:
        from ipykernel.kernelspec import write_kernel_spec
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import KernelManager

        folder = self.enterContext(tempfile.TemporaryDirectory())
        write_kernel_spec(Path(folder, "recipe"))  # this interpreter, whatever is installed
        manager = KernelManager(
            kernel_name="recipe",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[folder]),
            connection_file=str(Path(folder, "connection.json")),
            transport="ipc",
        )
        manager.start_kernel(cwd=str(ROOT), env={**os.environ, "IPYTHONDIR": folder})
        self.addCleanup(manager.shutdown_kernel, now=True)
        self.kernel = manager.client()
        self.kernel.start_channels()
        self.addCleanup(self.kernel.stop_channels)
        self.kernel.wait_for_ready(timeout=TIMEOUT)

    def run_cell(self, cell: str) -> str:
        """Run a cell, which must succeed, and return what it shows."""
        shown: list[str] = []

        def show(message: dict[str, Any]) -> None:
            content = message["content"]
            shown.append(content.get("text", "") or content.get("data", {}).get("text/plain", ""))

        reply = self.kernel.execute_interactive(cell, output_hook=show, timeout=TIMEOUT)
        self.assertEqual(reply["content"]["status"], "ok", reply["content"])
        return "".join(shown)

    def test_posterior_moves(self) -> None:
        """In a kernel the posterior moves between two cells, and the kernel's loop stays its own."""
        with running("server.py", "--port", "0", "--interval", "10") as process:
            url = first_line(process)
            # The port of the recipe's URL is replaced by a free one.
            start, look, stop = (
                cell.replace("ws://localhost:8765/websocket", url) for cell in cells()
            )
            self.assertEqual(self.run_cell(start), "")
            wait_until(lambda: int(self.run_cell("client.posterior.trials")))
            seen = self.run_cell(look)
            self.assertRegex(seen, r"\ABeta\(\d+, \d+\)  mean .*\n.{60}\n\Z")
            posterior, _ = seen.splitlines()
            wait_until(lambda: posterior not in self.run_cell(look))
            self.assertEqual(self.run_cell(stop), "")
            trials = self.run_cell("client.posterior.trials")
            self.assertGreater(int(trials), 0)
            self.run_cell("import asyncio; await asyncio.sleep(0)")
            self.assertEqual(self.run_cell("client.posterior.trials"), trials)
            threads = "import threading; [t for t in threading.enumerate() if '_listen' in t.name]"
            self.assertEqual(self.run_cell(threads), "[]")


class PassItOnTests(PairCase):
    """Pass it on."""

    def setUp(self) -> None:
        super().setUp()
        self.relay_port = free_port()
        self.code = block("Pass it on", p8765=self.port, p8766=self.relay_port)
        self.results = Recorder(f"ws://localhost:{self.relay_port}/websocket")

    @gen_test
    async def test_result_is_a_stream(self) -> None:
        """Programs get the posterior of all samples, one sample for every message."""
        with program(self.code):
            self.follow(self.results)
            await until(lambda: self.results.epoch and self.server.clients)
            self.server.send_message([1, 1])
            await until(lambda: len(self.results.samples) == 1)
            self.server.send_message([0, 1])
            await until(lambda: len(self.results.samples) == 2)
        self.assertEqual([sample["trials"] for sample in self.results.samples], [2, 4])
        last = self.results.samples[-1]  # Beta(4, 2), whose variance is 4 * 2 / (6 * 6 * 7)
        self.assertAlmostEqual(last["mean"], 4 / 6)
        self.assertAlmostEqual(last["sd"], math.sqrt(8 / 252))
        self.assertNotEqual(self.results.epoch, self.server.epoch)

    @gen_test
    async def test_result_is_a_page(self) -> None:
        """People get the same as text, which their browser asks for again every second."""
        self.server.send_message([1, 1, 0, 1])
        with program(self.code):
            self.follow(self.results)
            await until(lambda: self.results.samples)
            answer = await AsyncHTTPClient().fetch(f"http://localhost:{self.relay_port}/")
        self.assertEqual(answer.body, b"Beta(4, 2)  mean 0.6667  sd 0.1782")
        self.assertEqual(answer.headers["Refresh"], "1")

    @gen_test
    async def test_first_server_restarts(self) -> None:
        """The relay keeps its counts when the first server restarts, and its clients notice nothing."""
        told = r"closed.* 1001 .*; next try in .* s\n(cannot connect: .*\n)*"
        with program(self.code, stderr=told):
            self.follow(self.results)
            self.server.send_message([1, 1])
            await until(lambda: self.results.samples)
            epoch = self.results.epoch
            await self.restart()
            self.server.send_message([0])
            await until(lambda: len(self.results.samples) == 2)
            self.assertEqual(self.results.samples[-1]["trials"], 3)
            self.assertEqual((self.results.epoch, self.results.missed), (epoch, 0))

    @gen_test
    async def test_relay_restarts(self) -> None:
        """Started again, the relay begins a new epoch with what the first server still holds."""
        self.server.history_size = 3
        self.server.send_message([1, 1, 1, 1])
        self.follow(self.results)
        with program(self.code):
            await until(lambda: self.results.samples)
            epoch = self.results.epoch
        with program(self.code):
            await until(lambda: self.results.epoch != epoch and len(self.results.samples) == 2)
        self.assertEqual([sample["trials"] for sample in self.results.samples], [3, 3])


class ListenTooTests(PairCase):
    """Listen, too: the handler."""

    def setUp(self) -> None:
        super().setUp()
        self.recipe: Any = load("Listen, too")["ListeningServer"]
        self.handler = fresh_server(self.recipe)
        self.address = self.serve(make_app(self.handler))

    async def connect(self) -> WebSocketClientConnection:
        return await websocket_connect(f"ws://{self.address}/websocket")

    async def say(self, message: str | bytes) -> tuple[int | None, str | None]:
        """Send one message and close; return the code and the reason that the server closes with."""
        connection = await self.connect()
        await connection.write_message(message, binary=isinstance(message, bytes))
        connection.close(1000)
        while await connection.read_message() is not None:
            pass
        await until(lambda: not self.handler.clients)
        return connection.close_code, connection.close_reason

    @gen_test
    async def test_key_changes_p(self) -> None:
        """Who knows the key changes p, and nothing is said to the contrary."""
        for p in ("0.5", "0", "1", "1e-3"):
            with self.subTest(p):
                self.assertEqual(await self.say(f"{self.recipe.key} {p}"), (1000, None))
                self.assertEqual(self.recipe.coin.p, float(p))

    @gen_test
    async def test_speaker_stays_connected(self) -> None:
        """Who speaks as agreed stays, and may speak again."""
        connection = await self.connect()
        for p in (0.25, 0.75):
            await connection.write_message(f"{self.recipe.key} {p}")
            await until(lambda: self.recipe.coin.p == p)  # noqa: B023
        await connection.read_message()  # the first one, which is empty
        self.handler.send_message([1])
        message = await connection.read_message()
        self.assertEqual(json.loads(message or "")["samples"], [1])
        connection.close()
        await until(lambda: not self.handler.clients)

    @gen_test
    async def test_refused(self) -> None:
        """Wrong type, key or range: a close code that says which, and p stays as it was."""
        key = self.recipe.key
        coin = self.recipe.coin
        for message, code, reason in [
            (f"{key} 0.5".encode(), 1003, "text only"),
            ("", 1008, "wrong key"),
            ("0.5", 1008, "wrong key"),
            (f"{key[:-1]} 0.5", 1008, "wrong key"),
            ("ключ 0.5", 1008, "wrong key"),
            (json.dumps({"key": key, "p": 0.5}), 1008, "wrong key"),
            (key, 1007, "p must be a number from 0 to 1"),
            (f"{key} half", 1007, "p must be a number from 0 to 1"),
            (f"{key} 1.5", 1007, "p must be a number from 0 to 1"),
            (f"{key} -0.1", 1007, "p must be a number from 0 to 1"),
            (f"{key} nan", 1007, "p must be a number from 0 to 1"),
            (f"{key} inf", 1007, "p must be a number from 0 to 1"),
            (f"{key} 0.5 0.6", 1007, "p must be a number from 0 to 1"),
        ]:
            with self.subTest(message):
                self.assertEqual(await self.say(message), (code, reason))
                self.assertIs(self.recipe.coin, coin)

    @gen_test
    async def test_too_long(self) -> None:
        """A message of more than 1 KiB is refused before the handler sees it."""
        connection = await self.connect()
        await connection.write_message(f"{self.recipe.key} 0.{'5' * 1024}")
        while await connection.read_message() is not None:
            pass
        connection.close()
        self.assertEqual(connection.close_code, 1009)
        self.assertEqual(self.recipe.coin.p, 0.72)
        await until(lambda: not self.handler.clients)


class SpeakingClientTests(ServerRecipeCase):
    """Listen, too: both programs."""

    def speak(self, *options: str) -> str:
        """Run the client that speaks, and return what it prints."""
        with program(block("Listen, too", 1, p8765=self.port), *options) as process:
            return first_line(process)

    def test_both_programs(self) -> None:
        """The client sets p to 0, and from then on every client gets 0s only; a stranger does not."""
        with program(block("Listen, too", p8765=self.port)) as server, self.recorder() as client:
            key = first_line(server)
            self.assertEqual(self.speak("a-guess", "1"), "1008 wrong key")
            self.assertEqual(self.speak(key, "2"), "1007 p must be a number from 0 to 1")
            self.assertEqual(self.speak(key, "0"), "1000 None")
            # By chance, with p = 0.72, that would come about once in 10 ** 11 times.
            wait_until(lambda: client.samples[-20:] == [0] * 20)


if __name__ == "__main__":
    unittest.main()
