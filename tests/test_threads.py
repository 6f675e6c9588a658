"""A client in a program: `run`, `start`, `stop` and `watch` at any moment, from any thread."""

import asyncio
import contextlib
import gc
import io
import logging
import os
import signal
import sys
import threading
from typing import Any
from unittest import mock

from client import WebSocketClient, watch
from tests.support import Recorder, ServedCase, following, free_port, running, until


def files() -> int:
    """Return how many files are open after a garbage collection, or 0 where nothing tells."""
    gc.collect()
    return len(os.listdir("/dev/fd")) if os.path.exists("/dev/fd") else 0


def threads() -> set[threading.Thread]:
    """Return all threads but those of asyncio, which look up names of hosts."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio")}


class Once(Recorder):
    """A client that stops itself when it has the first samples."""

    def on_message(self, samples: list[Any]) -> None:
        super().on_message(samples)
        self.stop()


class Exiting(Recorder):
    def on_message(self, samples: list[Any]) -> None:
        sys.exit("bad sample")


class RunTests(ServedCase):
    async def test_ends_at_stop(self) -> None:
        """`run` ends normally, also where tasks begin eagerly; a stop too many does nothing."""
        loop = asyncio.get_running_loop()
        self.addCleanup(loop.set_task_factory, None)
        self.handler.send_message([1])
        for factory in None, getattr(asyncio, "eager_task_factory", None):  # from Python 3.12 on
            loop.set_task_factory(factory)
            client = Once(self.url)
            client.stop()
            await client.run()
            client.stop()
            self.assertEqual(client.samples, [1])

    async def test_caller_is_not_cancelled(self) -> None:
        """After a time limit has ended run, stop does nothing, and the client can go on."""
        client = Recorder(self.url)
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(0.01):
                await client.run()
        with self.assertRaises(TimeoutError):
            await asyncio.wait_for(client.run(), 0.01)
        client.stop()
        await asyncio.sleep(0)  # where a cancellation would arrive
        client.start()
        await until(lambda: client.connected)
        await asyncio.to_thread(client.stop)

    async def test_time_limit_waits_for_on_message(self) -> None:
        """What an async on_message does when it is cancelled is done when run has ended."""
        ended = asyncio.Event()

        class Saving(Recorder):
            async def on_message(self, samples: list[Any]) -> None:
                limit.reschedule(0)
                try:
                    await asyncio.Event().wait()
                finally:
                    await asyncio.sleep(0.01)
                    ended.set()

        client = Saving(self.url)
        self.handler.send_message([1, 2])
        with self.assertRaises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await client.run()
        self.assertTrue(ended.is_set())
        self.assertEqual(client.position, 0)

    async def test_second_follower(self) -> None:
        """Whoever calls run or start while the client follows has a RuntimeError."""

        client = Recorder(self.url)
        async with following(client):
            await until(lambda: client.connected)
            self.assertRaises(RuntimeError, client.start)
            with self.assertRaises(RuntimeError):
                await client.run()
        client.start()
        await until(lambda: client.connected)
        self.assertRaises(RuntimeError, client.start)
        with self.assertRaises(RuntimeError):
            await client.run()
        await asyncio.to_thread(client.stop)

    async def test_everyday_names(self) -> None:
        """A subclass may have attributes of its own with names that one uses every day."""
        client = Recorder(self.url)
        names = {"limit", "task", "queue", "connect", "take", "loop", "message", "wait", "_samples"}
        names |= {f"_{name}" for name in names}
        for name in names:
            setattr(client, name, "mine")
        self.handler.send_message([1])
        async with following(client):
            await until(lambda: client.samples == [1])
        self.assertEqual({getattr(client, name) for name in names}, {"mine"})


class ThreadTests(ServedCase):
    async def test_start_and_stop(self) -> None:
        """Each start goes on where stop has ended the last; a stop too many does nothing."""
        client, before = Recorder(self.url), threads()
        client.stop()
        for count in 1, 2, 3:
            client.start()
            self.assertTrue(client.thread and client.thread.daemon)  # or a program would not end
            self.handler.send_message([count])
            await until(lambda: len(client.samples) == count)  # noqa: B023
            await asyncio.to_thread(client.stop)
            client.stop()
            await until(lambda: threads() == before)
        self.assertEqual((client.samples, client.position), ([1, 2, 3], 3))

    async def test_stop_in_on_message(self) -> None:
        """It does not wait for itself; the thread ends, and no further call comes."""
        client, before = Once(self.url), threads()
        self.handler.send_message([1])
        client.start()
        await until(lambda: threads() == before)
        self.assertEqual((client.samples, client.position), ([1], 1))

    async def test_stop_in_a_thread_of_on_message(self) -> None:
        """An async on_message that awaits a thread in which stop is called does not hang."""

        class Delegating(Recorder):
            async def on_message(self, samples: list[Any]) -> None:
                await asyncio.to_thread(self.stop)

        client, before = Delegating(self.url), threads()
        self.handler.send_message([1])
        client.start()
        await until(lambda: threads() == before)
        await client.run()
        self.assertFalse(client.connected)

    async def test_stop_at_any_moment(self) -> None:
        """After 200 starts, each with a stop in another thread, nothing is left, and all works."""
        client, before, opened = Recorder(self.url), threads(), files()

        def start_and_stop() -> None:
            stopping = threading.Thread(target=client.stop)
            stopping.start()
            client.start()
            stopping.join()
            client.stop()

        for _ in range(200):
            await asyncio.to_thread(start_and_stop)
        client.start()
        await until(lambda: client.connected)
        await asyncio.to_thread(client.stop)
        await until(lambda: threads() == before, threads)
        # Tornado keeps the rare connection that is made while a thread closes its event loop.
        await until(lambda: files() < opened + 5, files)

    async def test_start_fails(self) -> None:
        """Without a free descriptor start raises an OSError, and stop returns; later both work."""
        client = Recorder(self.url)
        full = mock.patch("asyncio.new_event_loop", side_effect=OSError("too many open files"))
        with full, self.assertRaises(OSError):
            client.start()
        client.stop()
        client.start()
        await until(lambda: client.connected)
        await asyncio.to_thread(client.stop)

    def test_event_loop_of_the_caller(self) -> None:
        """start and stop leave the event loop of the thread that calls them as it is."""
        loop = asyncio.new_event_loop()
        self.addCleanup(loop.close)
        asyncio.set_event_loop(loop)
        client = WebSocketClient(f"ws://127.0.0.1:{free_port()}/")
        client.start()
        client.stop()
        self.assertIs(asyncio.get_event_loop(), loop)


class SystemExitTests(ServedCase):
    async def test_stop(self) -> None:
        """It ends the thread, and comes out of stop."""
        client, before = Exiting(self.url), threads()
        self.handler.send_message([1])
        client.start()
        await until(lambda: threads() == before)
        with self.assertRaisesRegex(SystemExit, "bad sample"):
            client.stop()
        self.assertEqual(client.position, 0)

    async def test_program(self) -> None:
        """It comes out of run and out of watch: the program prints it, and has status 1."""
        self.handler.send_message([1])
        for call in "asyncio.run(Exiting({!r}).run())", "watch(Exiting({!r}))":
            code = "import asyncio\nfrom tests.test_threads import *\n" + call.format(self.url)
            with running("-c", code) as process:
                _, log = await asyncio.to_thread(process.communicate)
            self.assertEqual(process.returncode, 1)
            self.assertIn("bad sample", log.splitlines())
        self.assertNotIn("Traceback", log)


class WatchTests(ServedCase):
    async def test_leaves_the_process_as_it_was(self) -> None:
        """It prints at once and at the end of the client, and changes no setting of the host."""

        def settings() -> list[Any]:
            loggers = [logging.getLogger(name) for name in ("", "client", "tornado", "asyncio")]
            logs = [(one.level, [*one.handlers], one.propagate, one.disabled) for one in loggers]
            return [logs, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]

        before = settings()
        self.handler.send_message([1])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            await asyncio.to_thread(watch, Once(self.url))
            self.assertIs(sys.stdout, output)
        self.assertEqual(output.getvalue(), 2 * f"{WebSocketClient(self.url)}\n")
        self.assertEqual(settings(), before)
