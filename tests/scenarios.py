"""Streams of numbers in the large faults, and what becomes of each number.

The tests run the scenarios with our two scripts, and with a server that loses numbers on purpose.
The measurements run them also with the plain loop, which writes to one client after the other.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any, NamedTuple

from tornado.ioloop import PeriodicCallback

from server import WebSocketServer, make_app
from tests import support
from tests.faults import Proxy, raw_client, request
from tests.programs import running
from tests.support import SEED, Recorder, following, own_port, until, url_at


class Pair(NamedTuple):
    """Who sends, and who follows."""

    handler: type[WebSocketServer] = WebSocketServer
    client: type[Recorder] = Recorder


OURS = Pair()


class LosingServer(WebSocketServer):
    """Loses each hundredth number on purpose, and says nothing."""

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        super().send_message([number for number in samples if number % 100 != 99])


def newest(client: Recorder) -> int:
    """Return the last number that a client has, or -1."""
    return client.samples[-1] if client.samples else -1


async def have(number: int, *clients: Recorder) -> None:
    """Wait until each of the clients has this number, or a later one."""
    await until(
        lambda: all(newest(client) >= number for client in clients),
        lambda: (number, [newest(client) for client in clients]),
    )


@dataclasses.dataclass
class Count:
    """What became of the numbers in a scenario, over all its clients."""

    wanted: int = 0  # numbers that should have arrived
    lost: int = 0
    doubled: int = 0  # or not in order
    unsaid: int = 0  # the difference between what each client has lost and what it has said

    def add(self, client: Recorder, first: int = 0) -> None:
        """Count what a client has of the numbers from the first to the newest that it has."""
        seen = set(client.samples)
        wanted = range(first, newest(client) + 1)
        lost = sum(number not in seen for number in wanted)
        self.wanted += len(wanted)
        self.lost += lost
        self.doubled += sum(after <= before for before, after in itertools.pairwise(client.samples))
        self.unsaid += abs(lost - client.missed)


@dataclasses.dataclass
class Scene:
    """A stream of the numbers 0, 1, 2 and so on in this process, and a healthy client of it."""

    handler: type[WebSocketServer]
    url: str
    control: Recorder
    sent: int = 0

    def send(self, count: int) -> None:
        """Send the next `count` numbers."""
        self.handler.send_message([*range(self.sent, self.sent + count)])
        self.sent += count

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        """Send ten numbers every 10 ms meanwhile, or fewer if the machine is busy."""
        flow = PeriodicCallback(lambda: self.send(10), 10)
        flow.start()
        try:
            yield
        finally:
            flow.stop()

    async def count(self, *clients: Recorder) -> Count:
        """Send until each client has a number that was sent after this call, and count then."""
        count, everyone = Count(), (self.control, *clients)
        with self.flowing():
            await have(self.sent, *everyone)  # which is the next one
        for client in everyone:
            count.add(client)
        return count


@contextlib.asynccontextmanager
async def scene(pair: Pair = OURS) -> AsyncIterator[Scene]:
    """Serve a new stream of numbers in this event loop, to a healthy client."""
    handler = support.new_handler(pair.handler)
    app = make_app(handler)
    async with support.serving(app) as url, following(control := pair.client(url)):
        await until(lambda: control.epoch)
        yield Scene(handler, url, control)


async def storm(
    pair: Pair = OURS, *, numbers: int = 20_000, connections: int = 25, history_size: int = 10_000
) -> Count:
    """Let 20 clients follow 1,000 numbers/s behind proxies that break every connection."""
    async with contextlib.AsyncExitStack() as stack:
        here = await stack.enter_async_context(scene(pair))
        here.handler.stream.history_size = history_size
        proxies = [Proxy(here.url) for _ in range(20)]
        for proxy in proxies:
            stack.push_async_callback(proxy.aclose)
        followers = [pair.client(proxy.url) for proxy in proxies]
        await stack.enter_async_context(following(*followers))
        await until(lambda: all(client.epoch for client in followers))
        breaking = [asyncio.create_task(proxy.misbehave()) for proxy in proxies]
        with here.flowing():
            await until(lambda: here.sent >= numbers, lambda: here.sent)
            await until(lambda: min(len(proxy.streams) for proxy in proxies) >= connections)
        for task in breaking:
            task.cancel()
        await asyncio.wait(breaking)
        return await here.count(*followers)


def number_server(
    handler: type[WebSocketServer], port: int, *, first: int = 0, batch: int = 1
) -> contextlib.AbstractContextManager[Popen[str]]:
    """Serve the numbers from `first` on in a process of its own, a batch every 5 ms."""
    code = f"""if True:
        import itertools, server
        from tornado.ioloop import PeriodicCallback
        from {handler.__module__} import {handler.__name__} as Handler
        async def main():
            app, numbers = server.make_app(Handler), itertools.count({first})
            send = lambda: Handler.send_message([*itertools.islice(numbers, {batch})])
            PeriodicCallback(send, 5).start()
            await server.serve(app, {port}, "127.0.0.1")
        server.run(main())"""
    return running("-c", code, stderr=DEVNULL, patience=600)


async def restarts(pair: Pair, *signals: signal.Signals, clients: int = 5) -> Count:
    """End a server with each of the signals and start it again; clients follow every run."""
    count = Count()
    with own_port() as port:
        followers = [pair.client(url_at(port)) for _ in range(clients)]
        async with following(*followers):
            for run, end in enumerate(signals):
                first = 1_000_000 * run  # so that no number of an earlier run counts
                with number_server(pair.handler, port, first=first) as process:
                    await have(first + 100, *followers)
                    process.send_signal(end)
                    await asyncio.to_thread(process.wait)
                await until(lambda: not any(client.connected for client in followers))
                for client in followers:  # nobody can know what it has not got of this run
                    count.add(client, first)
                    client.samples.clear()
                    client.missed = 0
    return count


async def never_reading(
    pair: Pair = OURS, *, seconds: float = 30, batch: int = 100
) -> tuple[Count, float]:
    """Let ten peers never read 200 batches/s; return also by how many MB the server has grown."""
    sizes, count = [], Count()
    async with contextlib.AsyncExitStack() as stack:
        port = stack.enter_context(own_port())
        process = stack.enter_context(number_server(pair.handler, port, batch=batch))
        await stack.enter_async_context(following(control := pair.client(url_at(port))))
        await have(0, control)
        for _ in range(10):
            await stack.enter_async_context(raw_client(control.url, request()))
        await have(25_000, control)  # from now on the history is full
        for _ in range(int(10 * seconds)):
            sizes.append(memory(process))
            await asyncio.sleep(0.1)
        await have(newest(control) + 1, control)  # it still streams
    count.add(control, control.samples[0])
    return count, max(sizes) - sizes[0]


def memory(process: Popen[str]) -> float:
    """Return the resident memory of a process on Linux, in MB."""
    pages = Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 1e6


class FaultCase(support.QuietCase):
    """A test whose random faults can be repeated, but for their timing: `SEED=123 python ...`."""

    def setUp(self) -> None:
        super().setUp()
        random.seed(SEED)

    async def asyncSetUp(self) -> None:
        asyncio.get_running_loop().set_debug(False)  # or everything takes four times as long

    def shortDescription(self) -> str:
        return f"{super().shortDescription()} SEED={SEED}"

    def assert_each_once(self, count: Count) -> None:
        """Check that every client has got every number once, and in order."""
        self.assertEqual((count.lost, count.doubled, count.unsaid), (0, 0, 0), count)

    def assert_found(self, count: Count) -> None:
        """Check that a server that loses numbers was found out; its clients cannot know."""
        self.assertGreater(count.lost, 0)
        self.assertEqual((count.doubled, count.unsaid), (0, count.lost), count)
