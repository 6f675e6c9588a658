"""The recipes that are clients and models, and need no more than Tornado: alone and as programs."""

import asyncio
import contextlib
import json
import math
import random
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from subprocess import STDOUT
from typing import Any
from unittest import mock

from tornado.ioloop import PeriodicCallback

from client import BetaBinomial
from tests.recipes import json_samples
from tests.recipes.checkpoint import Checkpointed, SavedPosterior
from tests.recipes.database import DatabaseClient
from tests.recipes.iterator import Samples
from tests.recipes.mean_variance import NumberClient
from tests.support import PATIENCE, ROOT, Recorder, ServedCase, following, free_port, running, until

URL = "ws://127.0.0.1:9/websocket"  # for clients that never start


class RecipeCase(ServedCase):
    """A test with a stream, and with a program and a file in a folder of its own."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "my file"
        self.output = self.folder / "output"
        for file in *ROOT.glob("*.py"), *ROOT.glob("tests/recipes/*.py"):
            shutil.copy(file, self.folder)

    def recipe(self, name: str, *options: object) -> Any:
        """Run the copy of a recipe until the block ends; all that it writes is in `self.output`."""
        file = self.enterContext(self.output.open("w"))
        words = map(str, options)
        return running(str(self.folder / f"{name}.py"), *words, stdout=file, stderr=STDOUT)

    async def shows(self, text: str) -> None:
        """Wait until the program has written this."""
        await until(lambda: text in self.output.read_text(), self.output.read_text)

    async def ends(self, process: Any, status: int = 0) -> None:
        """Wait until the program ends, and check that it does so quietly."""
        await until(lambda: process.poll() is not None, self.output.read_text)
        self.assertNotRegex(self.output.read_text(), "Traceback|Exception ignored")
        self.assertEqual(process.returncode, status)

    async def kill_often(self, name: str, position: Callable[[], int]) -> None:
        """Kill a recipe again and again while samples come; then let it take them all."""
        self.stream.history_size = 10**6
        feeding = PeriodicCallback(lambda: self.handler.send_message([random.getrandbits(1)]), 1)
        feeding.start()
        for _ in range(5):
            goal = position() + random.randint(1, 50)
            with self.recipe(name, self.path, "--url", self.url):  # which ends with SIGKILL
                await until(lambda: position() >= goal, self.output.read_text)  # noqa: B023
        feeding.stop()
        with self.recipe(name, self.path, "--url", self.url):
            await until(lambda: position() == self.stream.end, self.output.read_text)


class ProgramTests(RecipeCase):
    async def test_ctrl_c(self) -> None:
        """A copy beside the scripts prints what it has of the stream, and ends at Ctrl-C."""
        self.handler.send_message([1, 0, 1])
        url = "--url", self.url
        for name, *options, shown in (
            ("mean_variance", *url, "3 samples  mean 0.666667  variance 0.333333  missed 0  ref"),
            ("checkpoint", self.path, *url, "Beta(3, 2)  mean 0.6000  sd 0.2000  missed 0  ref"),
            ("database", f"{self.path}.db", *url, "position 3  missed 0\n"),
            ("json_samples", "--port", free_port(), "Reading(place="),
        ):
            with self.subTest(name), self.recipe(name, *options) as process:
                await self.shows(shown)
                process.send_signal(signal.SIGINT)
                await self.ends(process)

    async def test_refusals(self) -> None:
        """An option that cannot be right, or another kind of file, is the usage and one line."""
        self.path.write_text("price\n10\n")
        for name, option, reason in (
            ("checkpoint", self.path, ".* is not a checkpoint of this model: .*"),
            ("database", self.path, ".*: file is not a database"),
            ("json_samples", "--port=0", "port must be from 1 to 65535"),
        ):
            with self.subTest(reason), self.recipe(name, option) as process:
                await self.ends(process, status=2)
                line = rf"\Ausage: .*\n( .*\n)*\S+: error: {reason}\n\Z"
                self.assertRegex(self.output.read_text(), line)


class ModelTests(RecipeCase):
    def test_refused_samples(self) -> None:
        """What a model does not take costs that sample, with a count and a line."""
        good = json_samples.measure()
        bad: list[Any] = ["", "nan", "inf", "1e308", None, [], 10**400, good]
        numbers, readings = NumberClient(URL), json_samples.Thermometers(URL)
        with self.assertLogs() as logged:
            numbers.on_message([1, *bad, "2"])  # as text, such as a line of a file
            readings.on_message([*bad, good | {"celsius": "1"}, good | {"time": "noon"}])
            SavedPosterior(URL, self.path).on_message([1, *bad, 0, 1])
        self.assertEqual(len(logged.output), 1 + 9 + 1)
        self.assertEqual((numbers.model.count, numbers.model.mean, numbers.refused), (2, 1.5, 8))
        self.assertEqual((readings.newest, readings.refused), (json_samples.read(good), 9))
        self.assertEqual(SavedPosterior(URL, self.path).state, [3, 2, 8])

    async def test_what_json_does_to_a_sample(self) -> None:
        """What the docstring of json_samples says of each type is so."""
        time, price, client = datetime(2026, 1, 2, tzinfo=UTC), Decimal("0.10"), Recorder(self.url)
        for refused in time, price, math.nan:
            self.assertRaises((TypeError, ValueError), self.handler.send_message, [0, refused])
        same: list[Any] = [None, True, "text", 10**30, 0.1, [1], {"a": {}}]
        self.handler.send_message([time.isoformat(), str(price), (1, 2), {1: 2}, *same])
        async with following(client):
            await until(lambda: client.samples)
        self.assertEqual(datetime.fromisoformat(client.samples[0]), time)
        self.assertEqual(Decimal(client.samples[1]), price)
        self.assertEqual(client.samples[2:], [[1, 2], {"1": 2}, *same])


class CheckpointTests(RecipeCase):
    def saved(self, name: str) -> Any:
        return json.loads(self.path.read_bytes())[name]

    async def test_kills(self) -> None:
        """A client that is killed again and again counts as much as one that never stopped."""
        SavedPosterior(URL, self.path)
        await self.kill_often("checkpoint", lambda: int(self.saved("position")))
        posterior = BetaBinomial().update([json.loads(text) for text in self.stream.history])
        self.assertEqual((self.saved("state"), self.saved("missed")), ([*posterior, 0], 0))

    def test_model_of_ones_own(self) -> None:
        """It goes on with the state that was saved; what could not be saved is not counted."""

        class Total(Checkpointed):
            state: Any = 0

            def update(self, samples: list[Any]) -> Any:
                return self.state + sum(samples)

        Total(URL, self.path).on_message([1, 2])
        client = Total(URL, self.path)
        for broken in "os.replace", "pathlib.Path.write_text":
            with mock.patch(broken, side_effect=OSError), self.assertRaises(OSError):
                client.on_message([4])
        self.assertEqual((client.state, Total(URL, self.path).state), (3, 3))
        with self.assertRaisesRegex(ValueError, "is not a checkpoint of this model"):
            SavedPosterior(URL, self.path)


class IteratorTests(RecipeCase):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.client = Samples(self.url)
        self.taken: list[int] = []
        self.handler.send_message([*range(8)])

    async def test_programs(self) -> None:
        """Both ways take as many samples as they were told, then the next; a loop may stay open."""
        code = "import sys, iterator\ni = iter(iterator.Samples(sys.argv[-1]))\nprint(next(i))"
        (self.folder / "open_loop.py").write_text(code)
        taken = r"\n5 samples, the last is 4\n(.*\n)*the next is 5\n"
        for name, *options, shown in (
            ("iterator", "script", "--count=5", taken),
            ("iterator", "asyncio", "--count=5", taken),
            ("open_loop", r"\A0\n\Z"),
        ):
            command = name, *options, "--url", self.url
            with self.subTest(command), self.recipe(*command) as process:
                await self.ends(process)
                self.assertRegex(self.output.read_text(), shown)

    async def test_loops_in_a_script(self) -> None:
        """After `del` the next one goes on; `stop` ends one that waits."""

        def take() -> None:
            loop = iter(self.client)
            self.taken.append(next(loop))
            del loop
            self.taken.extend(self.client)

        loops = asyncio.create_task(asyncio.to_thread(take))
        await until(lambda: 7 in self.taken and self.client.connected, lambda: self.taken)
        await asyncio.to_thread(self.client.stop)
        await loops
        self.assertEqual(self.taken, [*range(8)])

    async def test_loops_in_a_coroutine(self) -> None:
        """After a cancellation or `break` the next one goes on; `stop` ends one that waits."""

        async def take() -> None:
            async for sample in self.client:
                self.taken.append(sample)

        cancelled = asyncio.create_task(take())
        await until(lambda: 0 in self.taken and self.client.connected)
        cancelled.cancel()
        await until(lambda: not self.client.connected)
        self.handler.send_message([8])
        async for sample in self.client:
            self.taken.append(sample)
            break
        self.handler.send_message([9])
        loop = asyncio.create_task(take())
        await until(lambda: 9 in self.taken, lambda: self.taken)
        self.client.stop()
        await loop
        self.assertEqual(self.taken, [*range(10)])


class DatabaseTests(RecipeCase):
    def rows(self, query: str = "SELECT * FROM samples") -> list[Any]:
        with contextlib.closing(sqlite3.connect(self.path)) as database:
            return database.execute(query).fetchall()

    def assert_all(self) -> None:
        """Check that each sample is a row once, and that a new client goes on after them."""
        epoch, texts = self.stream.epoch, self.stream.history
        client = DatabaseClient(URL, self.path)
        self.assertEqual(self.rows(), [(epoch, offset, text) for offset, text in enumerate(texts)])
        progress = client.epoch, client.position, client.missed
        self.assertEqual(progress, (epoch, len(texts), 0))

    async def test_kills(self) -> None:
        """However often it is killed, each sample is a row once."""
        await self.kill_often("database", lambda: DatabaseClient(URL, self.path).position)
        self.assert_all()

    async def test_failure(self) -> None:
        """It comes out of on_message, so the same samples come again, and nothing is written."""
        client = DatabaseClient(URL, self.path)
        self.rows("DROP TABLE progress")
        with self.assertRaisesRegex(sqlite3.OperationalError, "no such table: progress"):
            await client.on_message([1])
        self.assertEqual(self.rows(), [])

    async def test_locked(self) -> None:
        """While another program has locked the database, the client waits, and says so."""
        client = DatabaseClient(self.url, self.path)
        client.patience = 0.01
        self.handler.send_message([1, "a", None])
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            with self.assertLogs("client", "WARNING") as logged:
                async with following(client):
                    await until(lambda: len(logged.output) >= 3)
                    other.rollback()
                    await until(self.rows)
        self.assertIn("my file: database is locked; trying again", logged.output[2])
        self.assert_all()

    async def test_write_that_is_interrupted(self) -> None:
        """What is written after `stop` has interrupted it is there once when it comes again."""
        client = DatabaseClient(self.url, self.path)
        client.patience = PATIENCE
        write = self.enterContext(mock.patch.object(client, "write", wraps=client.write))
        self.handler.send_message([1, 2, 3])
        with contextlib.closing(sqlite3.connect(self.path)) as other:
            other.execute("BEGIN IMMEDIATE")
            async with following(client):
                await until(lambda: write.called)
        self.assertEqual(client.position, 0)
        await until(self.rows)
        self.handler.send_message([4])
        async with following(client):
            await until(lambda: len(self.rows()) == 4)
        self.assert_all()
