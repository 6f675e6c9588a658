"""What a sample costs, side by side with the libraries that one would take instead: the parts.

To add a part, write it and name it in PARTS. How a library is used, and the processes, are elsewhere.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import platform
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client import BetaBinomial
from server import RandomBernoulli, WebSocketServer
from tests.contestants import CONTESTANTS, log
from tests.measuring import SPAWN, TIMEOUT, Process, Server, count, load, serving, ticks, watch
from tests.recipes.fast_lane import frame
from tests.support import HANDSHAKE, until

PACKAGES = "tornado", "websockets", "websocket-client", "aiohttp", "picows", "starlette", "uvicorn"
Measure = Callable[[str], Sequence[float]]  # takes the name of a contestant


@dataclasses.dataclass
class Row:
    """A row of a table: for each contestant what was measured, round by round."""

    label: str
    digits: int = 1
    ratio: bool = False  # whether to add the median of the ratios to ours in the same round
    limit: float = math.inf  # whoever has more was stopped
    values: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def cell(self, name: str) -> str:
        """Write the median, and how it compares to ours."""
        if name not in self.values:
            return ""
        values = self.values[name]
        median = statistics.median(values)
        text = f"{median:,.{self.digits}f}" if median <= self.limit else f"> {self.limit:g}"
        if name == "ours" or not self.ratio:
            return text
        pairs = zip(values, self.values["ours"], strict=False)  # some take fewer rounds than ours
        return f"{text} ({statistics.median(a / b for a, b in pairs):.2f})"


def progress(text: str) -> None:
    """Show what is being measured."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def versions() -> str:
    """Name what is measured, and on what."""
    names = [f"Python {platform.python_version()}", f"{os.cpu_count()} cores", platform.system()]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            names.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(names)


def table(*rows: Iterable[object]) -> None:
    """Print a Markdown table, whose first row is the heading."""
    for number, row in enumerate(rows):
        texts = [str(cell) for cell in row]
        print("|", " | ".join(texts), "|")
        if number == 0:
            print("|---" + "|---:" * (len(texts) - 1) + "|")
    print()


PRESENT = {name: one for name, one in CONTESTANTS.items() if importlib.util.find_spec(one.module)}
SENDERS = [name for name, one in PRESENT.items() if one.serve]
RECEIVERS = [name for name, one in PRESENT.items() if one.receive]
LIBRARIES = [name for name in SENDERS if name != "bare socket"]  # it can do nothing but send


def take_turns(
    what: str, names: Sequence[str], rounds: int, measure: Measure, *rows: Row
) -> Sequence[Row]:
    """Measure one contestant after the other, round by round: one number for each row."""
    for turn in range(rounds):
        for name in names:
            progress(f"{what}, round {turn + 1}, {name}")
            for row, value in zip(rows, measure(name), strict=False):
                row.values.setdefault(name, []).append(value)
    for row in rows:
        row.label = f"{what}: {row.label}"
    return rows


def wait_for_all(watchers: Process, clients: int, since: float) -> list[float]:
    """Return when each client got its first sample since then, once all have got one."""
    firsts: dict[int, float] = {}
    while len(firsts) < clients:
        if time.perf_counter() > since + TIMEOUT:
            sys.exit(f"{len(firsts)} of {clients} clients are there")
        time.sleep(0.5)
        firsts = {number: at for number, at, _ in reversed(watchers.ask(since))}
    return list(firsts.values())


# Sending. The coroutines run in the process of a server.


async def hand_over(server: Server, rate: int, seconds: float, limit: float) -> tuple[float, float]:
    """Hand over each sample by a call of its own; return how late the last came, and the cost."""
    cpu, begun, handed, late = time.process_time(), time.perf_counter(), 0, math.inf
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds + limit):
            while handed < rate * seconds:
                due = int(min(time.perf_counter() - begun, seconds) * rate)
                for _ in range(min(due - handed, rate // 4)):  # late or not, the loop must turn
                    handed += 1
                    await server.send([1 + (handed == rate * seconds)])
                await asyncio.sleep(0.001)
            await server.delivered.wait()
            late = time.perf_counter() - begun - seconds
    return late, time.process_time() - cpu


def overload(rounds: int, clients: int, rate: int, seconds: float, limit: float) -> Sequence[Row]:
    """A source that is faster than sending; whoever is late by a second takes one round only."""
    too_late: set[str] = set()

    def measure(name: str) -> Sequence[float]:
        if name in too_late:
            return []
        with serving(name, clients) as (_, server, loading):
            loading.ask(clients)
            before = peak = server.memory()
            server.pipe.send((hand_over, rate, seconds, limit))
            while not server.pipe.poll(0.1):
                peak = max(peak, server.memory())
            late, cpu = server.answer()
            got = loading.ask(sys.maxsize)  # samples, by all clients together
        if late > 1:
            too_late.add(name)
        percent = 100 * got / clients / rate / seconds
        return late, percent, cpu / max(1, got) * 1e6, peak - before

    late, percent = Row("s late", limit=limit), Row("% of the samples delivered", 0)
    cost, growth = Row("us per sample and client", 2, ratio=True), Row("MiB more", 0)
    label = f"{rate:,} samples/s, {clients} clients"
    return take_turns(label, LIBRARIES, rounds, measure, late, percent, cost, growth)


async def deliver(server: Server, messages: int) -> float:
    """Send messages, each when all clients have the one before; return the processor time."""
    start = time.process_time()
    for _ in range(messages):
        server.delivered.clear()
        await server.send([2])
        await server.delivered.wait()
    return time.process_time() - start


def fan_out(rounds: int, clients: int, messages: int) -> Sequence[Row]:
    """One sample to many clients."""
    label, servers = f"send to {clients:,} clients", {}
    with contextlib.ExitStack() as stack:
        for name in SENDERS:
            _, servers[name], loading = stack.enter_context(serving(name, clients))
            loading.ask(clients)
        measure = lambda name: [servers[name].ask(deliver, messages) / messages / clients * 1e6]
        row = Row("us per message and client", ratio=True)
        return take_turns(label, SENDERS, rounds, measure, row)


# Receiving, and both.


async def single_client() -> WebSocketServer:
    """Wait for the only client of our server."""
    await until(lambda: WebSocketServer.clients)
    return next(iter(WebSocketServer.clients))


async def blast(server: Server, messages: int, batch: int) -> None:
    """Send messages as fast as a single client takes them, the first one alone."""
    client: Any = await single_client()
    first, *rest = (frame(log.message([1] * batch).encode()) for _ in range(messages))
    client.ws_connection.stream.write(first)
    await asyncio.sleep(0.2)
    client.ws_connection.stream.write(b"".join(rest))
    await until(lambda: not WebSocketServer.clients)


def receiving(rounds: int, messages: int, batch: int) -> Sequence[Row]:
    """Receive, take apart and count."""
    samples = messages * batch
    with serving("ours", 0) as (port, server, _):

        def measure(name: str) -> Sequence[float]:
            with Process(count, name, port, samples) as client:
                server.pipe.send((blast, messages, batch))
                cpu, _ = client.answer()
            server.answer()
            return [cpu / samples * 1e6]

        row = Row("us per sample", 2, ratio=True)
        return take_turns(f"receive {batch} in a message", RECEIVERS, rounds, measure, row)


async def run(server: Server, rate: float) -> None:
    """Send the time, so often per second, until asked to stop."""
    stop = asyncio.get_running_loop().run_in_executor(None, server.pipe.recv)
    async for now in ticks(rate, math.inf):
        await server.send([now])
        if stop.done():
            break


def ages(
    name: str, port: int, server: Process, clients: int, pause: float, rate: int, seconds: float
) -> list[float]:
    """Return how old each sample was that so many clients got, all of them being there."""
    begun = time.perf_counter()
    server.pipe.send((run, rate))
    with Process(watch, name, port, clients, pause) as watchers:
        wait_for_all(watchers, clients, begun)
        begun = time.perf_counter()
        time.sleep(seconds)
        records = watchers.ask(begun)
        server.ask("stop")
    return [at - sample for _, at, sample in records]


def slow_consumer(rounds: int, seconds: float) -> Sequence[Row]:
    """An on_message that takes longer than the time between two messages; one round."""

    def measure(name: str) -> Sequence[float]:
        with serving("ours", 0) as (port, server, _):
            return ages(name, port, server, 1, 0.02, 500, seconds)[-1:]

    row = Row(f"s behind after {seconds:g} s", 2)
    return take_turns("on_message of 20 ms, 500 messages/s", RECEIVERS, 1, measure, row)


def delay(rounds: int, clients: int, rate: int, seconds: float) -> Sequence[Row]:
    """How old a sample is when it reaches on_message, at fifty clients among all."""
    watched, servers = min(clients, 50), {}
    label = f"{clients:,} client{'s'[: clients - 1]}, {rate} messages/s"
    with contextlib.ExitStack() as stack:
        for name in LIBRARIES:
            servers[name] = stack.enter_context(serving(name, clients, places=watched))

        def measure(name: str) -> Sequence[float]:
            port, server, _ = servers[name]
            found = sorted(ages(name, port, server, watched, 0, rate, seconds))
            return statistics.median(found) * 1e3, found[int(len(found) * 0.99)] * 1e3

        rows = [Row(f"ms of delay, {which}", 2, True) for which in ("median", "99th percentile")]
        return take_turns(label, LIBRARIES, rounds, measure, *rows)


async def toss(server: Server, batch: int, messages: int) -> float:
    """Toss and send to a single client, each message when the one before is written."""
    coin, client = RandomBernoulli(0.72), await single_client()
    start = time.perf_counter()
    for _ in range(messages):
        await server.send([coin.sample() for _ in range(batch)])
        while client.writing:
            await asyncio.sleep(0)
    await until(lambda: not WebSocketServer.clients)
    WebSocketServer.history.clear()  # the next client is to get nothing of this round
    return start


def end_to_end(rounds: int, batch: int, messages: int) -> Sequence[Row]:
    """How much of the speed of tossing and counting is left with a network in between."""
    coin = RandomBernoulli(0.72)
    with serving("ours", 0) as (port, server, _):

        def measure(name: str) -> Sequence[float]:
            with Process(count, name, port, batch * messages) as client:
                server.pipe.send((toss, batch, messages))
                _, end = client.answer()
            start = server.answer()
            begun, posterior = time.perf_counter(), BetaBinomial()
            for _ in range(messages):
                posterior = posterior.update([coin.sample() for _ in range(batch)])
            return [(time.perf_counter() - begun) / (end - start)]

        row = Row("share of the speed without a network", 3)
        return take_turns(f"end to end, {batch:,} in a message", ["ours"], rounds, measure, row)


# Memory, and coming back.


def idle_client(rounds: int, clients: int) -> Sequence[Row]:
    """What one more client costs that gets nothing but pings."""

    def measure(name: str) -> Sequence[float]:
        with serving(name, 1, pings=True) as (port, server, _):
            before = server.memory()
            with Process(load, SPAWN.Pipe()[0], port, clients, 0) as idlers:
                idlers.answer()
                return [(server.memory() - before) / clients * 1024]

    return take_turns("an idle client", LIBRARIES, min(rounds, 3), measure, Row("KiB", 1, True))


async def flood(server: Server, size: int, seconds: float) -> None:
    """Send large messages, a hundred per second."""
    WebSocketServer.history_size = size // 3  # samples of three characters each
    async for _ in ticks(100, seconds):
        await server.send([1] * (size // 3))


def deaf_client(rounds: int, seconds: float) -> Sequence[Row]:
    """What a client costs that does not read; one round."""

    def measure(name: str) -> Sequence[float]:
        with serving(name, 0) as (port, server, _):
            deaf = socket.create_connection(("127.0.0.1", port))
            deaf.sendall(HANDSHAKE)
            before = server.memory()
            server.ask(flood, 1 << 16, seconds)
            return [server.memory() - before]

    # To await a write, as the others do, stops the stream for everybody.
    names = [name for name in LIBRARIES if name not in ("aiohttp", "starlette")]
    row = Row(f"MiB more after {seconds:g} s")
    return take_turns("a client that does not read", names, 1, measure, row)


def recovery(rounds: int, clients: int) -> Sequence[Row]:
    """How soon all clients are back after a restart of the server, and how suddenly."""

    def measure(name: str) -> Sequence[float]:
        with contextlib.ExitStack() as stack:
            with serving(name, 0) as (port, server, _):
                server.pipe.send((run, 20))
                watchers = stack.enter_context(Process(watch, name, port, clients, 0))
                wait_for_all(watchers, clients, time.perf_counter())
            with serving(name, 0, port=port) as (_, server, _):
                restarted = time.perf_counter()
                server.pipe.send((run, 20))
                times = [at - restarted for at in wait_for_all(watchers, clients, restarted)]
        crowd = max(sum(t <= u < t + 0.1 for u in times) for t in times)
        return statistics.median(times), max(times), crowd

    names = [name for name in ("ours", "websockets") if name in PRESENT]  # they come back alone
    label = f"{clients} clients after a restart"
    rows = Row("s until half are back"), Row("s until all are back"), Row("most in any 100 ms", 0)
    return take_turns(label, names, min(rounds, 3), measure, *rows)


# Each part, what it is given after the rounds, once for each tuple, and what if it is to be tiny.
PARTS: dict[str, tuple[Callable[..., Sequence[Row]], list[Any], list[Any]]] = {
    "overload": (overload, [(200, 2_000, 5, 60), (200, 10_000, 5, 60)], [(5, 2_000, 0.2, 20)]),
    "fan-out": (fan_out, [(1_000, 20), (4_000, 5)], [(20, 5)]),
    "receiving": (receiving, [(20_000, 1), (20_000, 10), (20_000, 100)], [(100, 10)]),
    "slow-consumer": (slow_consumer, [(10,)], [(0.3,)]),
    "delay": (delay, [(1_000, 10, 2), (1, 100, 1)], [(5, 50, 0.3)]),
    "end-to-end": (end_to_end, [(1, 1_000), (1_000, 1_000)], [(50, 20)]),
    "idle-client": (idle_client, [(1_000,)], [(20,)]),
    "deaf-client": (deaf_client, [(5,)], [(0.3,)]),
    "recovery": (recovery, [(200,)], [(3,)]),
}


def main() -> None:
    """Measure all parts, or those that are named, and print two tables: overload and the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="what to measure: all")
    parser.add_argument("--rounds", type=int, default=5, help="that all take turns in: 5")
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs, once")
    options = parser.parse_args()
    rounds = 1 if options.tiny else options.rounds
    print(f"{versions()}. Median of {rounds} rounds (ratio to ours in the same round).\n")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # open files; other processes inherit it
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in CONTESTANTS.keys() - PRESENT.keys():
        print(f"{name} is left out: it is not installed.\n")
    for parts in ["overload"], [part for part in PARTS if part != "overload"]:
        rows: list[Row] = []
        for part in parts:
            measure, full, tiny = PARTS[part]
            if part in (options.part or PARTS):
                for setting in tiny if options.tiny else full:
                    rows += measure(rounds, *setting)
        names = [name for name in CONTESTANTS if any(name in row.values for row in rows)]
        if rows:
            table(["", *names], *([row.label, *map(row.cell, names)] for row in rows))
    progress("")


if __name__ == "__main__":
    main()
