"""What a sample costs, side by side with the libraries that one would take instead: the parts.

To add a part, write it and name it in PARTS; what takes a Server runs in that server's process.
To add a library, see contestants.py. The processes are in measuring.py.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import math
import os
import platform
import resource
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client import BetaBinomial
from server import RandomBernoulli, WebSocketServer
from tests.contestants import CONTESTANTS, log
from tests.measuring import TIMEOUT, Load, Process, Receiver, Server, serving, ticks
from tests.recipes.fast_lane import frame
from tests.support import HANDSHAKE, until

LIMIT = 60  # seconds; whoever is later is stopped


class Row(NamedTuple):
    """A row of a table, with what was measured of each contestant, round by round."""

    label: str
    digits: int = 1
    ratio: bool = False  # whether to add the median of the ratios to ours in the same round

    def cell(self, name: str, values: dict[str, list[float]]) -> str:
        """Write the median of a contestant, and how it compares to ours."""
        if name not in values:
            return ""
        median = statistics.median(values[name])
        text = f"{median:,.{self.digits}f}" if median < math.inf else f"> {LIMIT}"
        if name == "ours" or not self.ratio:
            return text
        pairs = zip(values[name], values["ours"], strict=False)  # some take fewer rounds than ours
        return f"{text} ({statistics.median(a / b for a, b in pairs):.2f})"


Found = dict[Row, dict[str, list[float]]]
Part = Iterator[dict[Row, float]]  # round by round, until it has enough: a number for each row
Measure = Callable[..., Part]  # takes the name of a contestant, and a size


PRESENT = {name: one for name, one in CONTESTANTS.items() if all(map(find_spec, one.modules))}
SENDERS = [name for name, one in PRESENT.items() if one.serve]
RECEIVERS = [name for name, one in PRESENT.items() if one.receive]
LIBRARIES = [name for name in SENDERS if name != "bare socket"]  # it can do nothing but send
# To await a write, as the others do, stops the stream for everybody.
UNSTOPPED = [name for name in LIBRARIES if name not in ("aiohttp", "starlette")]
RECONNECTING = [name for name in ("ours", "websockets") if name in PRESENT]


def versions() -> str:
    """Name what is measured, and on what."""
    names = [f"Python {platform.python_version()}", f"{os.cpu_count()} cores", platform.system()]
    packages = importlib.metadata.packages_distributions()
    used = dict.fromkeys(packages[name][0] for one in PRESENT.values() for name in one.modules)
    return ", ".join(names + [f"{name} {importlib.metadata.version(name)}" for name in used])


def table(*rows: Iterable[object]) -> None:
    """Print a Markdown table, whose first row is the heading."""
    for number, row in enumerate(rows):
        texts = [str(cell) for cell in row]
        print("|", " | ".join(texts), "|")
        if number == 0:
            print("|---" + "|---:" * (len(texts) - 1) + "|")
    print()


def take_turns(part: Measure, names: Iterable[str], size: Iterable[float], rounds: int) -> Found:
    """Measure one contestant after the other, round by round."""
    found: Found = {}
    parts = {name: part(name, *size) for name in names}
    for turn in range(rounds):
        for name, measuring in parts.items():
            print(f"{part.__name__}{size}, round {turn + 1}, {name}", file=sys.stderr)
            for row, value in next(measuring, {}).items():
                found.setdefault(row, {}).setdefault(name, []).append(value)
    return found


async def hand_over(server: Server, rate: int, seconds: float) -> tuple[float, float]:
    """Hand over each sample by a call of its own; return how late the last came, and the cost."""
    cpu, begun, handed, late = time.process_time(), time.perf_counter(), 0, math.inf
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds + LIMIT):
            while handed < rate * seconds:
                due = int(min(time.perf_counter() - begun, seconds) * rate)
                for _ in range(min(due - handed, rate // 4)):  # late or not, the loop must turn
                    handed += 1
                    await server.send([int(handed < rate * seconds)])
                await asyncio.sleep(0.001)
            await server.delivered.wait()
            late = time.perf_counter() - begun - seconds
    return late, time.process_time() - cpu


def overload(name: str, clients: int, rate: int, seconds: float) -> Part:
    """A source that is faster than sending; whoever is late by a second takes one round only."""
    label, late = f"{rate:,} samples/s, {clients} clients", 0.0
    while late <= 1:
        with serving(name, clients) as (_, server, loading):
            before = server.memory()
            late, cpu = server.ask(hand_over, rate, seconds)
            more = server.memory("VmHWM") - before
            got = loading.ask(Load.taken)
        yield {
            Row(f"{label}: s late"): late,
            Row(f"{label}: % of the samples delivered", 0): 100 * got / clients / rate / seconds,
            Row(f"{label}: us per sample and client", 2, ratio=True): cpu / max(1, got) * 1e6,
            Row(f"{label}: MiB more", 0): more,
        }


async def deliver(server: Server, messages: int) -> float:
    """Send messages, each when all clients have the one before; return the processor time."""
    start = time.process_time()
    for _ in range(messages):
        server.delivered.clear()
        await server.send([0])
        await server.delivered.wait()
    return time.process_time() - start


def fan_out(name: str, clients: int, messages: int) -> Part:
    """One sample to many clients."""
    row = Row(f"send to {clients:,} clients: us per message and client", ratio=True)
    with serving(name, clients) as (_, server, _):
        while True:
            yield {row: server.ask(deliver, messages) / messages / clients * 1e6}


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


def receiving(name: str, messages: int, batch: int) -> Part:
    """Receive, take apart and count."""
    row, samples = Row(f"receive {batch} in a message: us per sample", 2, True), messages * batch
    with serving("ours", 0) as (port, server, _):
        while True:
            with Process(Receiver) as client:
                server.begin(blast, messages, batch)
                cpu, _ = client.ask(Receiver.count, name, port, samples)
            server.answer()
            yield {row: cpu / samples * 1e6}


async def run(server: Server, rate: float, seconds: float, size: int = 0) -> None:
    """Send the time, or so many samples, so often per second."""
    async for now in ticks(rate, seconds):
        await server.send([1] * size or [now])


def arrivals(server: Process, watchers: Process, clients: int, rate: float) -> list[float]:
    """Send until each client has got a sample, and return when each had its first one."""
    begun, firsts = time.perf_counter(), dict[int, float]()
    while len(firsts) < clients:
        if time.perf_counter() > begun + TIMEOUT:
            sys.exit(f"{len(firsts)} of {clients} clients are there")
        server.ask(run, rate, 0.5)
        records = watchers.ask(Receiver.since, begun)
        firsts = {number: at for number, at, _ in reversed(records)}
    return list(firsts.values())


def ages(
    name: str, port: int, server: Process, clients: int, pause: float, rate: int, seconds: float
) -> list[float]:
    """Return how old, in ms, each sample was that so many clients got, all of them being there."""
    with Process(Receiver) as watchers:
        watchers.ask(Receiver.watch, name, port, clients, pause)
        arrivals(server, watchers, clients, rate)
        begun = time.perf_counter()
        server.ask(run, rate, seconds)
        return [(at - sample) * 1e3 for _, at, sample in watchers.ask(Receiver.since, begun)]


def slow_consumer(name: str, seconds: float) -> Part:
    """An on_message that takes longer than the time between two messages; one round."""
    with serving("ours", 0) as (port, server, _):
        behind = ages(name, port, server, 1, 0.02, 500, seconds)[-1]
    yield {
        Row(f"on_message of 20 ms, 500 messages/s: s behind after {seconds:g} s", 2): behind / 1e3
    }


def delay(name: str, clients: int, rate: int, seconds: float) -> Part:
    """How old a sample is when it reaches on_message, at fifty clients among all."""
    label = f"{clients:,} client{'s'[: clients - 1]}, {rate} messages/s: ms of delay"
    watched = min(clients, 50)
    with serving(name, clients, places=watched) as (port, server, _):
        while True:
            found = sorted(ages(name, port, server, watched, 0, rate, seconds))
            yield {
                Row(f"{label}, median", 2, ratio=True): statistics.median(found),
                Row(f"{label}, 99th percentile", 2, ratio=True): found[int(len(found) * 0.99)],
            }


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


def end_to_end(name: str, batch: int, messages: int) -> Part:
    """How much of the speed of tossing and counting is left with a network in between."""
    coin = RandomBernoulli(0.72)
    row = Row(f"end to end, {batch:,} in a message: share of the speed without a network", 3)
    with serving(name, 0) as (port, server, _):
        while True:
            with Process(Receiver) as client:
                server.begin(toss, batch, messages)
                _, end = client.ask(Receiver.count, name, port, batch * messages)
            start = server.answer()
            begun, posterior = time.perf_counter(), BetaBinomial()
            for _ in range(messages):
                posterior = posterior.update([coin.sample() for _ in range(batch)])
            yield {row: (time.perf_counter() - begun) / (end - start)}


def idle_client(name: str, clients: int) -> Part:
    """What one more client costs that gets nothing but pings; at most three rounds."""
    for _ in range(3):
        with serving(name, 1, pings=True) as (port, server, loading):
            before = server.memory()
            loading.ask(Load.connect, port, clients)
            more = server.memory() - before
        yield {Row("an idle client: KiB", ratio=True): more / clients * 1024}


def deaf_client(name: str, seconds: float) -> Part:
    """What a client costs that does not read; one round."""
    with serving(name, 0) as (port, server, _):
        deaf = socket.create_connection(("127.0.0.1", port))
        deaf.sendall(HANDSHAKE)
        before = server.memory()
        server.ask(run, 100, seconds, (1 << 16) // 3)  # of three characters each
        more = server.memory() - before
    yield {Row(f"a client that does not read: MiB more after {seconds:g} s"): more}


def recovery(name: str, clients: int) -> Part:
    """How soon all clients are back after a restart, and how suddenly; at most three rounds."""
    label = f"{clients} clients after a restart"
    for _ in range(3):
        with Process(Receiver) as watchers:
            with serving(name, 0) as (port, server, _):
                watchers.ask(Receiver.watch, name, port, clients, 0)
                arrivals(server, watchers, clients, 20)
            with serving(name, 0, port=port) as (_, server, _):
                restarted = time.perf_counter()
                times = [at - restarted for at in arrivals(server, watchers, clients, 20)]
        crowd = max(sum(t <= u < t + 0.1 for u in times) for t in times)
        yield {
            Row(f"{label}: s until half are back"): statistics.median(times),
            Row(f"{label}: s until all are back"): max(times),
            Row(f"{label}: most in any 100 ms", 0): crowd,
        }


# Each part, whom it measures, the sizes that it is given after a name, and the one if it is tiny.
PARTS: dict[str, tuple[Measure, Sequence[str], list[Any], Any]] = {
    "overload": (overload, LIBRARIES, [(200, 2_000, 5), (200, 10_000, 5)], (5, 2_000, 0.2)),
    "fan-out": (fan_out, SENDERS, [(1_000, 20), (4_000, 5)], (20, 5)),
    "receiving": (receiving, RECEIVERS, [(20_000, 1), (20_000, 10), (20_000, 100)], (100, 10)),
    "slow-consumer": (slow_consumer, RECEIVERS, [(10,)], (0.3,)),
    "delay": (delay, LIBRARIES, [(1_000, 10, 2), (1, 100, 1)], (5, 50, 0.3)),
    "end-to-end": (end_to_end, ["ours"], [(1, 1_000), (1_000, 1_000)], (50, 20)),
    "idle-client": (idle_client, LIBRARIES, [(1_000,)], (20,)),
    "deaf-client": (deaf_client, UNSTOPPED, [(5,)], (0.3,)),
    "recovery": (recovery, RECONNECTING, [(200,)], (3,)),
}


def main() -> None:
    """Measure all parts, or those that are named, and print two tables: overload and the rest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="what to measure: all")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s, at most")
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs, once")
    options = parser.parse_args()
    rounds = 1 if options.tiny else options.rounds
    print(f"{versions()}. Median of {rounds} rounds (ratio to ours in the same round).\n")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # open files; other processes inherit it
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in CONTESTANTS.keys() - PRESENT.keys():
        print(f"{name} is left out: it is not installed.\n")
    for titles in ["overload"], [title for title in PARTS if title != "overload"]:
        found: Found = {}
        for title in titles:
            part, names, full, tiny = PARTS[title]
            if title in (options.part or PARTS):
                for size in [tiny] if options.tiny else full:
                    found |= take_turns(part, names, size, rounds)
        columns = [name for name in CONTESTANTS if any(name in found[row] for row in found)]
        if found:
            rows = ([row.label, *(row.cell(name, found[row]) for name in columns)] for row in found)
            table(["", *columns], *rows)


if __name__ == "__main__":
    main()
