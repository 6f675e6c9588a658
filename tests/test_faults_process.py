"""Processes that end, starve or run out of something, and peers that fall silent.

SEED repeats a failure; LONG_TESTS=1 takes the full time.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import unittest
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from tornado.iostream import StreamClosedError

from tests.faults import answer, raw_client, request
from tests.programs import running, url_of
from tests.scenarios import (
    OURS,
    FaultCase,
    LosingServer,
    Pair,
    have,
    memory,
    never_reading,
    number_server,
    restarts,
    scene,
)
from tests.support import LONG, PATIENCE, Recorder, fast_runner, following, own_port, until, url_at

needs_proc = unittest.skipUnless(sys.platform == "linux", "reads /proc, which only Linux has")
needs_posix = unittest.skipIf(os.name == "nt", "Windows has no such signals and limits")


@needs_posix
class RestartTests(FaultCase):
    async def test_restarts(self) -> None:
        """Of each run of a server, a client has every number up to the last that it has got."""
        signals = (signal.SIGKILL, signal.SIGTERM) * (5 if LONG else 1)
        self.assert_each_once(await restarts(OURS, *signals, clients=20))

    async def test_positive_control(self) -> None:
        """With a server that loses numbers on purpose, the count finds them."""
        self.assert_found(await restarts(Pair(LosingServer), signal.SIGKILL))


class SilenceTests(FaultCase):
    """Peers that fall silent are given up after 10 to 25 s, here on a clock that runs faster."""

    def run_faster(self, program: Coroutine[Any, Any, None]) -> None:
        with fast_runner(20) as runner:
            runner.run(asyncio.wait_for(program, 20 * PATIENCE))

    def test_silent_client(self) -> None:
        """A server drops a peer that sends no request, half of one, or no answer to a ping."""
        for silent in (b"", request()):
            self.run_faster(self.dropped(silent))
        for slow in (request()[:-2], request("Content-Length: 9999", method="POST")):
            self.run_faster(self.dropped(slow, one_a_second=b"x"))

    async def dropped(self, data: bytes, one_a_second: bytes = b"") -> None:
        """Send this, then perhaps a byte a second, until the server closes the connection."""
        loop = asyncio.get_running_loop()
        async with scene() as here, raw_client(here.url, data) as peer:
            begin = loop.time()
            end = asyncio.ensure_future(peer.read_until_close())
            while not end.done():
                here.send(1)
                with contextlib.suppress(StreamClosedError):
                    await peer.write(one_a_second)
                await asyncio.sleep(1)
            self.assertGreater(loop.time() - begin, 9)  # and not at once
            self.assert_each_once(await here.count())

    def test_silent_server(self) -> None:
        """A server that answers nothing, or half, is given up, and tried again."""
        for half in (b"", b"HTTP/1.1 101 Switching Prot"):
            self.run_faster(self.tried_again(half))

    async def tried_again(self, half: bytes) -> None:
        """Answer so, and be silent then, until the client has come a second time."""
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            async with following(Recorder(url_at(listener.getsockname()[1]))):
                for _ in range(2):
                    peer, _ = await loop.sock_accept(listener)
                    self.enterContext(peer)  # which stays open
                    await loop.sock_sendall(peer, half)


class ResourceTests(FaultCase):
    """What runs short: open files, memory, the processor, and time itself."""

    @needs_posix
    async def test_open_files(self) -> None:
        """1,024 are enough for 900 clients and 110 who say nothing; the 901st client gets 503."""
        import resource  # which Windows does not have

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)  # of this process, the clients'
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        code = """if True:
            import resource, server
            resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
            server.run(server.main())"""
        url = url_at(port := self.enterContext(own_port()))
        options = "--address", "127.0.0.1", "--port", str(port)
        clients = [Recorder(url) for _ in range(900)]
        log = self.enterContext(tempfile.TemporaryFile("w+"))
        with running("-c", code, *options, stderr=log):
            async with following(*clients), contextlib.AsyncExitStack() as silent:
                await until(lambda: all(client.position for client in clients))
                for _ in range(110):
                    await silent.enter_async_context(raw_client(url, b""))
                self.assertEqual(await answer(url, request()), "503")
                goal = clients[0].position + 10
                await until(lambda: all(client.position >= goal for client in clients))
        log.seek(0)
        self.assertNotIn(
            "Traceback", log.read()
        )  # without a free file, each accept that fails logs one
        for client in clients:
            self.assertEqual((len(client.samples), client.missed), (client.position, 0))
            self.assertEqual(client.samples[:goal], clients[0].samples[:goal])

    @needs_proc
    async def test_never_reading(self) -> None:
        """Ten peers that never read make the server no bigger, and cost another nothing."""
        seconds, batch = (30, 100) if LONG else (1, 500)
        count, growth = await never_reading(seconds=seconds, batch=batch)
        self.assert_each_once(count)
        self.assertLess(growth, 5)

    @needs_proc
    async def test_connections_made_and_dropped(self) -> None:
        """They leave no descriptor open, and 26,000 of them (or 300) at most 4 MB of memory."""
        sizes: list[float] = []
        url = url_at(port := self.enterContext(own_port()))
        with number_server(OURS.handler, port) as process:
            files = Path(f"/proc/{process.pid}/fd")
            async with following(control := Recorder(url)):
                await have(0, control)
                before = len([*files.iterdir()])
                for number in (3_000, 26_000) if LONG else (200, 300):
                    for _ in range(number // 50):
                        visits = [answer(url, request(), then_end=True) for _ in range(50)]
                        self.assertEqual(await asyncio.gather(*visits), 50 * ["dropped"])
                    await until(lambda: len([*files.iterdir()]) == before)
                    sizes.append(memory(process))
        self.assertLess(sizes[1], sizes[0] + 4)  # the first are what the heap needs

    async def follow_numbers(self, statement: str) -> None:
        """Follow server.py while its source runs this statement before it returns a number n."""
        code = f"""if True:
            import itertools, time, server
            numbers, now = itertools.count(), time.time
            def sample(self):
                n = next(numbers)
                {statement}
                return n
            server.RandomBernoulli.sample = sample
            server.run(server.main())"""
        with running("-c", code, "--port", "0", "--interval", "10") as process:
            url = await asyncio.to_thread(url_of, process)
            async with following(client := Recorder(url)):
                await have(80, client)
        self.assertEqual((client.samples, client.missed), ([*range(client.position)], 0))

    async def test_slow_source(self) -> None:
        """A source that is slower than its interval skips turns, but loses no number."""
        await self.follow_numbers("time.sleep(0.03)")

    async def test_clock_that_steps(self) -> None:
        """A clock that is set back, and then an hour forward, costs no number."""
        back = 5 if LONG else 0.5  # so much later comes the next toss: Tornado reads this clock
        await self.follow_numbers(
            f"time.time = lambda: now() - {back} * (n > 30) + 3600 * (n > 60)"
        )

    async def test_busy_processor(self) -> None:
        """A server that gets little of the processor skips turns, but loses no number."""
        with contextlib.ExitStack() as others:
            for _ in range(1 + (os.cpu_count() or 1)):
                others.enter_context(running("-c", "while True: pass"))
            await self.follow_numbers("pass")
