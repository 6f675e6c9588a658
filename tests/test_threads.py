"""A client in a program: `run`, `start`, `stop` and `watch` at any moment, from any thread.

What a client does with what it receives is left to test_rule.py.
"""

import asyncio
import contextlib
import gc
import logging.config
import os
import random
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

from client import WebSocketClient, watch
from tests.programs import running
from tests.support import Recorder, ServedCase, following, new_handler, until


def files() -> int:
    """Return how many files are open after a garbage collection, or 0 where nothing tells."""
    gc.collect()
    return len(os.listdir("/dev/fd")) if os.path.exists("/dev/fd") else 0


def threads() -> set[threading.Thread]:
    """Return all threads but those that asyncio keeps for `to_thread` and for names of hosts."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio")}


@contextlib.asynccontextmanager
async def started(client: WebSocketClient) -> AsyncIterator[None]:
    """Start a client, and stop it at the end."""
    client.start()
    try:
        await until(lambda: client.connected)
        yield
    finally:
        await asyncio.to_thread(client.stop)


class Once(Recorder):
    """A client that stops itself when it has the first samples."""

    def on_message(self, samples: list[Any]) -> Any:
        super().on_message(samples)
        self.stop()


class Delegating(Recorder):
    """A client that waits until another thread has stopped it."""

    async def on_message(self, samples: list[Any]) -> None:
        super().on_message(samples)
        await asyncio.to_thread(self.stop)


class RunTests(ServedCase):
    async def test_ends_at_stop(self) -> None:
        """`run` ends normally, also where tasks begin eagerly; an extra stop does nothing."""
        loop = asyncio.get_running_loop()
        self.handler.send_message([1])
        for factory in None, getattr(asyncio, "eager_task_factory", None):  # from Python 3.12 on
            loop.set_task_factory(factory)
            for client in Once(self.url), Delegating(self.url):
                client.stop()
                await client.run()
                client.stop()
                self.assertEqual(client.samples, [1])

    async def test_second_run(self) -> None:
        """A failure at its start, also of a task that begins eagerly, is logged and tried again."""
        loop = asyncio.get_running_loop()
        loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))
        self.handler.send_message([1])
        client = Once(self.url, retry_delay=1e-9)
        await client.run()  # it leaves a cancelled task, which is not that of the second run
        broken = mock.patch.object(client, "request", side_effect=KeyError("token"))
        with broken, self.assertLogs("client", "WARNING") as logs:
            async with following(client):
                await until(lambda: len(logs.output) > 2)  # two for each failure

    async def test_caller_is_not_cancelled(self) -> None:
        """After a time limit has ended run, stop does nothing, and the client can go on."""
        client = Recorder(self.url)
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(0.01):
                await client.run()
        client.stop()
        await asyncio.sleep(0)  # where a cancellation would arrive
        async with started(client):
            pass

    async def test_time_limit_waits_for_on_message(self) -> None:
        """`run` ends only when an async on_message that it has cancelled has cleaned up."""

        class Saving(Recorder):
            async def on_message(self, samples: list[Any]) -> None:
                limit.reschedule(0)  # a moment that is past: the limit is over now
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0.01)
                    super().on_message(samples)

        client = Saving(self.url)
        self.handler.send_message([1, 2])
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await client.run()
        self.assertEqual((client.samples, client.position), ([1, 2], 0))

    async def test_second_follower(self) -> None:
        """Whoever calls run or start while the client follows has a RuntimeError."""
        client = Recorder(self.url)
        for first in following(client), started(client):
            async with first:
                self.assertRaises(RuntimeError, client.start)
                with self.assertRaises(RuntimeError):
                    await client.run()

    async def test_everyday_names(self) -> None:
        """A subclass of either class may use everyday names for attributes and methods of its own."""
        everyday = {"limit", "task", "queue", "connect", "take", "loop", "message", "wait"}
        private = {f"_{name}" for name in everyday} | {"_samples"}
        nearly_ours = {"listen", "follow", "move"}  # the client has _listen, _follow and _move
        names = everyday | private | nearly_ours
        theirs = mock.Mock()
        self.handler = new_handler(**dict.fromkeys(names, theirs))
        await self.restart()
        client = type("Own", (Recorder,), dict.fromkeys(names, theirs))(self.url)
        self.handler.send_message([1])
        async with following(client):
            await until(lambda: client.samples == [1])
            (served,) = self.handler.clients
            # What we set would hide theirs, and what we call would be a call of theirs.
            found = {getattr(one, name) for one in (client, served) for name in names}
        self.assertEqual(found, {theirs})
        theirs.assert_not_called()


class ThreadTests(ServedCase):
    async def test_start_and_stop(self) -> None:
        """Each start goes on where stop has ended the last; an extra stop does nothing."""
        client, before = Recorder(self.url), threads()
        client.stop()
        for count in 1, 2, 3:
            async with started(client):
                # Otherwise, a program could not end before its client.
                self.assertTrue(client.thread and client.thread.daemon)
                self.handler.send_message([count])
                await until(lambda: len(client.samples) == count)  # noqa: B023
            client.stop()
            await until(lambda: threads() <= before)
        self.assertEqual((client.samples, client.position), ([1, 2, 3], 3))

    async def test_stop_in_on_message(self) -> None:
        """There, or in a thread that on_message awaits, stop does not wait for the thread's end."""
        before = threads()
        self.handler.send_message([1])
        for client in Once(self.url), Delegating(self.url):
            client.start()
            await until(lambda: threads() <= before)
            self.assertEqual(client.samples, [1])

    async def test_stop_at_any_moment(self) -> None:
        """After 200 starts, each with a stop in another thread, nothing is left, and all works."""
        client, before, opened = Recorder(self.url), threads(), files()

        def start_and_stop() -> None:
            stopping = threading.Timer(random.uniform(0, 0.003), client.stop)
            stopping.start()
            client.start()
            stopping.join()
            client.stop()

        for _ in range(200):
            await asyncio.to_thread(start_and_stop)
        async with started(client):
            pass
        await until(lambda: threads() <= before, threads)
        # Tornado keeps the rare connection that is made while a thread closes its event loop.
        await until(lambda: files() < opened + 5, files)

    async def test_start_fails(self) -> None:
        """Without a free descriptor start raises an OSError, and stop returns; later both work."""
        client = Recorder(self.url)
        full = mock.patch("asyncio.new_event_loop", side_effect=OSError("too many open files"))
        with full, self.assertRaises(OSError):
            client.start()
        client.stop()
        async with started(client):
            pass

    def test_event_loop_of_the_caller(self) -> None:
        """start and stop leave the event loop of the thread that calls them as it is."""
        loop = asyncio.get_event_loop()
        client = WebSocketClient(self.url)
        client.start()
        client.stop()
        self.assertIs(asyncio.get_event_loop(), loop)


def configure() -> None:
    """Set the log as a program may that uses a client."""
    null = {"class": "logging.NullHandler"}
    root = {"level": "ERROR", "handlers": ["null"]}
    logging.config.dictConfig({"version": 1, "handlers": {"null": null}, "root": root})


def settings() -> list[Any]:
    """Return how log and signals are set."""
    loggers = [logging.getLogger(name) for name in ("", "client", "tornado", "asyncio")]
    logs = [(one.level, one.handlers, one.propagate, one.disabled) for one in loggers]
    return [logs, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]


class WatchTests(ServedCase):
    async def test_leaves_the_process_as_it_was(self) -> None:
        """Log and signals are as the program sets them, whether it does so before watch or after it.

        `watch` adds a handler to a log that has none, and must do no more than that.
        """
        self.handler.send_message([1])
        watching = f"watch(Once({self.url!r}))"
        found = set()
        for program in "configure()", f"configure(); {watching}", f"{watching}; configure()":
            code = f"from tests.test_threads import *; {program}; print(settings())"
            with running("-c", code) as process:
                out, _ = await asyncio.to_thread(process.communicate)
            found.add(out.splitlines()[-1])
        self.assertEqual(len(found), 1, found)

    async def test_system_exit(self) -> None:
        """sys.exit in on_message ends the client, and comes out of stop, and so of watch."""

        class Exiting(Recorder):
            def on_message(self, samples: list[Any]) -> None:
                sys.exit("bad sample")

        self.handler.send_message([1])
        with contextlib.redirect_stdout(None), self.assertRaisesRegex(SystemExit, "bad sample"):
            await asyncio.to_thread(watch, Exiting(self.url))
