"""The recipes that are clients and models, and need no more than Tornado: alone and as programs."""

import asyncio
import contextlib
import json
import random
import sqlite3
from collections.abc import Callable
from typing import Any, ClassVar
from unittest import mock

from tornado.ioloop import PeriodicCallback

from client import BetaBinomial
from tests.programs import URL, RecipeCase
from tests.recipes import json_samples
from tests.recipes.checkpoint import Checkpointed, SavedPosterior
from tests.recipes.database import DatabaseClient
from tests.recipes.iterator import Samples
from tests.recipes.mean_variance import NumberClient
from tests.support import PATIENCE, following, own_port, until


class ProgramTests(RecipeCase):
    async def test_ctrl_c(self) -> None:
        """A copy beside the scripts prints what it has of the stream, and ends at Ctrl-C."""
        self.handler.send_message([1, 0, 1])
        url = "--url", self.url
        for name, *options, shown in (
            ("mean_variance", *url, "3 samples  mean 0.666667  variance 0.333333  missed 0"),
            ("checkpoint", self.path, *url, "Beta(3, 2)  mean 0.6000  sd 0.2000  missed 0"),
            ("database", f"{self.path}.db", *url, "position 3  missed 0"),
            ("json_samples", "--port", self.enterContext(own_port()), "Reading(place="),
        ):
            with self.subTest(name), self.recipe(name, *options) as client:
                await self.shows(client, shown)
                await self.interrupt(client)

    async def test_refusals(self) -> None:
        """An impossible port, or a file of something else, gets the usage and one line."""
        self.path.write_text('{"epoch": null, "position": 0, "missed": 0, "state": "of a model"}')
        await self.refuses(".* is not a checkpoint of this model: .*", "checkpoint", self.path)
        await self.refuses(".*: file is not a database", "database", self.path)
        await self.refuses("port must be from 1 to 65535", "json_samples", "--port=0")


class ModelTests(RecipeCase):
    """What a model does not take costs that sample, with a count and a line."""

    bad: ClassVar[list[Any]] = ["", "nan", "inf", None, [], {}, 10**400]

    def test_numbers(self) -> None:
        """A text may be a number, such as a line of a file; a square must not be infinite."""
        client = NumberClient(URL)
        with self.assertLogs():
            client.on_message([1, *self.bad, "1e308", "2"])
        self.assertEqual((client.model.count, client.model.mean, client.refused), (2, 1.5, 8))

    def test_readings(self) -> None:
        """A reading must have all of its parts."""
        good = json_samples.measure()
        client = json_samples.Thermometers(URL)
        with self.assertLogs() as logged:
            client.on_message([*self.bad, good, good | {"celsius": "1"}, good | {"time": "noon"}])
        self.assertEqual((client.newest, client.refused), (json_samples.read(good), 9))
        self.assertEqual(len(logged.output), 9)

    def test_tosses(self) -> None:
        """A toss is 0 or 1."""
        with self.assertLogs():
            SavedPosterior(URL, self.path).on_message([1, *self.bad, 0, 1])
        self.assertEqual(SavedPosterior(URL, self.path).state, [3, 2, 7])


class KilledCase(RecipeCase):
    async def kill_often(self, name: str, position: Callable[[], int]) -> None:
        """Kill a recipe again and again while samples come; then let it take them all."""
        self.stream.history_size = 10**6
        feeding = PeriodicCallback(lambda: self.handler.send_message([random.getrandbits(1)]), 1)
        feeding.start()
        for _ in range(5):
            goal = position() + random.randint(1, 50)
            with self.recipe(name, self.path, "--url", self.url):
                await until(lambda: position() >= goal)  # noqa: B023
        feeding.stop()
        with self.recipe(name, self.path, "--url", self.url):
            await until(lambda: position() == self.stream.end)


class CheckpointTests(KilledCase):
    async def test_kills(self) -> None:
        """A client that is killed again and again counts as much as one that never stopped."""
        SavedPosterior(URL, self.path)  # makes the file
        saved: Callable[[], Any] = lambda: json.loads(self.path.read_bytes())
        await self.kill_often("checkpoint", lambda: int(saved()["position"]))
        posterior = BetaBinomial().update([json.loads(text) for text in self.stream.history])
        self.assertEqual((saved()["state"], saved()["missed"]), ([*posterior, 0], 0))

    def test_model_of_ones_own(self) -> None:
        """It goes on with the state that was saved; what could not be saved is not counted."""

        class Total(Checkpointed):
            state: Any = 0

            def update(self, samples: list[Any]) -> Any:
                return self.state + sum(samples)

        Total(URL, self.path).on_message([1, 2])
        client = Total(URL, self.path)
        with mock.patch("os.replace", side_effect=OSError), self.assertRaises(OSError):
            client.on_message([4])
        self.assertEqual((client.state, Total(URL, self.path).state), (3, 3))
        with self.assertRaisesRegex(ValueError, "is not a checkpoint of this model"):
            SavedPosterior(URL, self.path)


class IteratorTests(RecipeCase):
    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.client = Samples(self.url)
        self.handler.send_message([*range(8)])

    async def test_programs(self) -> None:
        """Both ways take exactly as many samples as they were told, and later the next one."""
        for count, way in (8, "script"), (9, "asyncio"):
            command = "iterator", way, "--count", count, "--url", self.url
            with self.subTest(way), self.recipe(*command) as program:
                await self.shows(program, f"{count} samples, the last is {count - 1}")
                self.handler.send_message([count])
                self.assertIn(f"the next is {count}\n", await self.ends(program))

    async def test_program_that_leaves_a_loop_open(self) -> None:
        """It ends without a traceback."""
        code = "import sys, iterator\ni = iter(iterator.Samples(sys.argv[-1]))\nprint(next(i))"
        (self.folder / "open_loop.py").write_text(code)
        with self.recipe("open_loop", self.url) as program:
            self.assertEqual(await self.ends(program), "0\n")

    async def test_loop_in_a_script(self) -> None:
        """`stop` ends one that waits."""
        taken: list[int] = []
        loop = asyncio.create_task(asyncio.to_thread(taken.extend, self.client))
        await until(lambda: len(taken) == 8, lambda: taken)
        await asyncio.to_thread(self.client.stop)
        await loop

    async def test_loop_in_a_coroutine(self) -> None:
        """After a cancellation the next one goes on; `stop` ends one that waits."""
        taken: list[int] = []

        async def take() -> None:
            async for sample in self.client:
                taken.append(sample)

        cancelled = asyncio.create_task(take())
        await until(lambda: taken and self.client.connected)
        cancelled.cancel()
        await until(lambda: not self.client.connected)
        self.handler.send_message([8])
        loop = asyncio.create_task(take())
        await until(lambda: 8 in taken, lambda: taken)
        self.client.stop()
        await loop
        self.assertEqual(taken, [*range(9)])


class DatabaseTests(KilledCase):
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
        """It comes out of on_message, as it must so that the samples come again; nothing is written."""
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
        self.assertIn(": database is locked; trying again", logged.output[2])
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
        await until(self.rows)  # the lock has gone with `other`, and the thread goes on
        self.handler.send_message([4])
        async with following(client):
            await until(lambda: len(self.rows()) == 4)
        self.assert_all()
