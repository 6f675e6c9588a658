"""Measure what a sample costs, side by side with the libraries that one would take instead.

Contestants take turns, round by round, and the load comes from processes of its own. Each table
shows the median of the rounds and, in brackets, the median of the ratios to ours in the same round.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client import BetaBinomial
from server import RandomBernoulli
from tests.contestants import (
    FLOODED,
    PEERS,
    RECEIVERS,
    SERVERS,
    Log,
    receive_ours,
    receive_tornado,
    receive_websockets,
    return_websockets,
)
from tests.measuring import SPAWN, Process, blast, load, prepare, receive, serve
from tests.support import HANDSHAKE

PACKAGES = "tornado", "websockets", "websocket-client", "aiohttp", "picows", "starlette", "uvicorn"


@dataclasses.dataclass
class Sizes:
    """How much is measured."""

    rounds: int = 5
    clients: tuple[int, ...] = (1, 100, 1_000, 4_000)
    deliveries: int = 20_000  # in a round of the fan-out
    messages: int = 20_000  # in a round of receiving
    batches: tuple[int, ...] = (1, 10, 100, 1_000, 10_000)
    samples: int = 500_000  # in a round from end to end, at most
    rates: tuple[int, ...] = (10, 1_000)  # messages per second
    audiences: tuple[int, ...] = (1, 1_000)
    delay_seconds: float = 2
    idle_clients: int = 1_000
    flood_seconds: float = 20
    returning_clients: int = 200
    overload_clients: int = 200
    overload_seconds: float = 5
    slow_seconds: float = 10


TINY = Sizes(1, (60,), 200, 100, (1, 100), 1_000, (100,), (1, 5), 0.3, 20, 0.5, 3, 5, 0.5, 0.5)


# Parts: each lets the contestants take turns, and yields the rows of its table.


def progress(text: str) -> None:
    """Show what is being measured."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def absent(name: str) -> str:
    """Say why this contestant cannot take part, or nothing."""
    package = PEERS.get(name)
    try:
        if package:
            importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return ""


def present(names: Iterable[str]) -> list[str]:
    """Return the contestants that can take part, and name the others."""
    for name in names:
        if reason := absent(name):
            print(f"{name} is left out: {reason}.\n")
    return [name for name in names if not absent(name)]


def cells(values: list[float], ours: list[float], form: str = "{:.1f}") -> str:
    """Write the median, and the median of the ratios to ours in the same round."""
    ratio = statistics.median(a / b for a, b in zip(values, ours, strict=True))
    return f"{form.format(statistics.median(values))} ({ratio:.2f})"


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


@contextlib.contextmanager
def audience(
    name: str, clients: int, pings: bool = False, places: int = 0
) -> Iterator[tuple[int, Process, Process]]:
    """Start the server of a contestant and its load; yield the port and both processes."""
    here, there = SPAWN.Pipe()
    with Process(serve, name, here, pings, 0) as server:
        port = server.answer()
        with Process(load, there, port, clients, name.startswith("ours"), places) as loading:
            loading.answer()
            yield port, server, loading


def fan_out(sizes: Sizes) -> None:
    """Print the microseconds of processor time per delivered message."""
    names = present(SERVERS)
    columns: dict[int, dict[str, list[float]]] = {}
    room = prepare() - 100
    for clients in sizes.clients:
        if clients > room:
            print(f"{clients:,} clients are left out: the limit of open files is too low.\n")
            continue
        # Few clients get many messages in a row, or waiting for them would cost more than sending.
        window = 1_000 if clients < 10 and sizes.deliveries > 1_000 else 1
        messages = max(1, sizes.deliveries // clients // window) * window
        size = 2 + len(Log().message([1]))
        times = columns[clients] = {name: [] for name in names}
        with contextlib.ExitStack() as stack:
            servers = {}
            for name in names:
                progress(f"fan-out: {clients:,} clients connect to {name}")
                _, servers[name], loading = stack.enter_context(audience(name, clients))
                loading.ask(size * clients * window)
            for turn in range(sizes.rounds + 1):  # the first one warms up
                for name in names:
                    progress(f"fan-out: {clients:,} clients, round {turn}, {name}")
                    seconds = servers[name].ask("fan out", (messages, window))
                    if turn:
                        times[name].append(seconds / messages / clients * 1e6)
    table(
        ["us per delivered message; clients:", *(f"{clients:,}" for clients in columns)],
        *([name, *(cells(c[name], c["ours"]) for c in columns.values())] for name in names),
    )


def overload(sizes: Sizes) -> None:
    """Print what a source costs that is faster than sending; one round, bounded in time."""
    names = [name for name in present(SERVERS) if not name.startswith("floor")]
    limit = 4 * sizes.overload_seconds
    rows = []
    for rate in 2_000, 10_000:
        ours = 0.0
        for name in names:
            progress(f"overload: {rate:,}/s, {name}")
            with audience(name, sizes.overload_clients) as (_, server, loading):
                loading.ask(0)
                late, cpu, grown = server.ask("overload", (rate, sizes.overload_seconds, limit))
            cpu *= 1e6 / sizes.overload_clients
            ours = ours or cpu
            after = f"> {limit - sizes.overload_seconds:.0f}" if late > limit else f"{late:.1f}"
            rows.append(
                [
                    f"{rate:,}/s: {name}",
                    after,
                    f"{cpu:.2f} ({cpu / ours:.2f})",
                    f"{grown / 2**20:.0f}",
                ]
            )
    table(
        [f"{sizes.overload_clients} clients", "s late", "us per sample and client", "MiB more"],
        *rows,
    )


def receiving(sizes: Sizes) -> None:
    """Print the microseconds of processor time per message that is received and counted."""
    names = present(RECEIVERS)
    batches = 1, 10, 100
    times: dict[int, dict[str, list[float]]] = {n: {name: [] for name in names} for n in batches}
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(Process(blast)).answer()
        clients = {name: stack.enter_context(Process(receive, RECEIVERS[name])) for name in names}
        for turn in range(sizes.rounds + 1):
            for batch in batches:
                url = f"ws://127.0.0.1:{port}/{sizes.messages}/{batch}"
                for name in names:
                    progress(f"receiving: round {turn}, {batch} samples, {name}")
                    seconds = clients[name].ask("count", (url, sizes.messages, batch))
                    if turn:
                        times[batch][name].append(seconds * 1e6)
    table(
        ["us per message; samples in it:", *(str(n) for n in batches), "us per sample, of 100"],
        *(
            [
                name,
                *(cells(times[n][name], times[n]["ours"]) for n in batches),
                f"{statistics.median(times[100][name]) / 100:.3f}",
            ]
            for name in names
        ),
    )


def slow_consumer(sizes: Sizes) -> None:
    """Print how old the samples are at the end, for a consumer of 20 ms at 500 messages/s."""
    rows = []
    for name in present(RECEIVERS):
        progress(f"slow consumer: {name}")
        with audience("ours", 0) as (port, server, _), Process(receive, RECEIVERS[name]) as client:
            server.ask("time", (500, sizes.slow_seconds))
            client.pipe.send(("slow", (f"ws://127.0.0.1:{port}/websocket", sizes.slow_seconds)))
            server.ask("now")
            rows.append([name, f"{client.answer():.2f}"])
    table(["", f"s behind after {sizes.slow_seconds:.0f} s"], *rows)


def end_to_end(sizes: Sizes) -> None:
    """Print how many samples per second go from the coin to the posterior."""
    rates: dict[int, list[float]] = {batch: [] for batch in sizes.batches}
    limits: dict[int, list[float]] = {batch: [] for batch in sizes.batches}
    coin = RandomBernoulli(0.72)
    with audience("ours", 0) as (port, server, _), Process(receive, receive_ours) as client:
        for turn in range(sizes.rounds + 1):
            for batch in sizes.batches:
                progress(f"end-to-end: round {turn}, {batch:,} samples in a message")
                batches = max(1, min(sizes.samples, batch * 3_000) // batch)
                server.ask("sample", (batch, batches))
                end = client.ask("follow", (f"ws://127.0.0.1:{port}/websocket", batch * batches))
                rate = batch * batches / (end - server.answer())
                begun, posterior = time.perf_counter(), BetaBinomial()
                for _ in range(batches):
                    posterior = posterior.update([coin.sample() for _ in range(batch)])
                limit = batch * batches / (time.perf_counter() - begun)
                if turn:
                    rates[batch].append(rate)
                    limits[batch].append(limit)
    table(
        ["samples per second; samples in a message:", *(f"{batch:,}" for batch in rates)],
        ["ours", *(f"{statistics.median(rate):,.0f}" for rate in rates.values())],
        [
            "without a network",
            *(f"{statistics.median(limit):,.0f}" for limit in limits.values()),
        ],
        [
            "ratio",
            *(
                f"{statistics.median(a / b for a, b in zip(rates[n], limits[n], strict=True)):.2f}"
                for n in rates
            ),
        ],
    )


def delay(sizes: Sizes) -> None:
    """Print how old a sample is when it reaches a client: one of fifty that are watched."""
    receivers = {
        "ours": receive_ours,
        "ours, fast lane": receive_ours,
        "Tornado, plain loop": receive_tornado,
        "websockets, broadcast": receive_websockets,
    }
    names = present(receivers)
    rows = []
    for audience_size in sizes.audiences:
        watched = min(audience_size, 50)
        with contextlib.ExitStack() as stack:
            servers = {
                name: stack.enter_context(audience(name, audience_size, places=watched))
                for name in names
            }
            clients = {
                name: stack.enter_context(Process(receive, receivers[name])) for name in names
            }
            for rate in sizes.rates:
                medians: dict[str, list[float]] = {name: [] for name in names}
                tails: dict[str, list[float]] = {name: [] for name in names}
                for turn in range(sizes.rounds):
                    for name in names:
                        progress(
                            f"delay: {audience_size:,} clients, {rate:,}/s, round {turn + 1}, {name}"
                        )
                        port, server, _ = servers[name]
                        url = f"ws://127.0.0.1:{port}/websocket"
                        server.ask("time", (rate, sizes.delay_seconds))
                        clients[name].ask("delays", (url, watched))  # they are there
                        server.ask("now")
                        ages = sorted(age * 1e3 for age in clients[name].answer())
                        medians[name].append(statistics.median(ages))
                        tails[name].append(ages[int(len(ages) * 0.99)])
                for name in names:
                    rows.append(
                        [
                            f"{audience_size:,} client{'s'[: audience_size - 1]}, {rate:,} messages/s: {name}",
                            cells(medians[name], medians["ours"], "{:.2f}"),
                            cells(tails[name], tails["ours"], "{:.2f}"),
                        ]
                    )
    table(["ms from sample to posterior", "median", "99th percentile"], *rows)


def memory_part(sizes: Sizes) -> None:
    """Print the memory of an idle client, and of one that does not read."""
    if not Path("/proc/self/statm").exists():
        print("memory is left out: this system has no /proc.")
        return
    names = present(
        [name for name in SERVERS if name.split()[-1] not in ("collector", "socket.send")]
    )
    idle: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(min(sizes.rounds, 3)):
        for name in names:
            progress(f"memory: {sizes.idle_clients:,} idle clients, round {turn + 1}, {name}")
            greeted = name.startswith("ours")
            with audience(name, 1, True) as (port, server, _):
                before = server.ask("memory", ())
                with Process(load, None, port, sizes.idle_clients, greeted) as idlers:
                    idlers.answer()
                    growth = server.ask("memory", ()) - before
            idle[name].append(growth / sizes.idle_clients / 1024)
    table(
        ["", "KiB per idle client"],
        *([name, cells(idle[name], idle["ours"])] for name in names),
    )
    flooded = [name for name in names if name in FLOODED]
    progress(f"memory: a client that does not read, {sizes.flood_seconds:.0f} s")
    with contextlib.ExitStack() as stack:
        servers = {}
        for name in flooded:
            port, servers[name], _ = stack.enter_context(audience(name, 0))
            deaf = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            deaf.sendall(HANDSHAKE)
        for name in flooded:
            servers[name].pipe.send(("flood", (1 << 16, sizes.flood_seconds)))
        grown = {name: servers[name].answer() / 2**20 for name in flooded}
    table(
        ["", f"MiB more after {sizes.flood_seconds:.0f} s of 64 KiB messages that are not read"],
        *([name, f"{grown[name]:.1f}"] for name in flooded),
    )


def recovery(sizes: Sizes) -> None:
    """Print how soon all clients are back after a restart of the server, and how suddenly."""
    receivers = {
        "ours": ("ours", receive_ours),
        "websockets, async for": ("websockets, broadcast", return_websockets),
    }
    rows = []
    for name in present(receivers):
        halves, alls, crowds = [], [], []
        for turn in range(min(sizes.rounds, 3)):
            progress(f"recovery: {sizes.returning_clients} clients, round {turn + 1}, {name}")
            server_name, receiver = receivers[name]
            here, _there = SPAWN.Pipe()
            with Process(receive, receiver) as clients:
                with Process(serve, server_name, here, False, 0) as server:
                    port = server.answer()
                    server.pipe.send(("run", (100,)))
                    url = f"ws://127.0.0.1:{port}/websocket"
                    clients.ask("return", (url, sizes.returning_clients))
                with Process(serve, server_name, here, False, port) as server:
                    server.answer()
                    restarted = time.perf_counter()
                    server.pipe.send(("run", (100,)))
                    times = [back - restarted for back in clients.answer()]
            halves.append(statistics.median(times))
            alls.append(times[-1])
            crowds.append(max(sum(t <= u < t + 0.1 for u in times) for t in times))
        rows.append(
            [
                name,
                f"{statistics.median(halves):.1f}",
                f"{statistics.median(alls):.1f}",
                round(statistics.median(crowds)),
            ]
        )
    heading = f"{sizes.returning_clients} clients after a restart"
    table([heading, "s until half are back", "s until all are back", "most in 100 ms"], *rows)


PARTS: dict[str, Callable[[Sizes], None]] = {
    "overload": overload,
    "fan-out": fan_out,
    "receiving": receiving,
    "slow-consumer": slow_consumer,
    "end-to-end": end_to_end,
    "delay": delay,
    "memory": memory_part,
    "recovery": recovery,
}


def main() -> None:
    """Measure all parts, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="what to measure: all")
    parser.add_argument("--rounds", type=int, help="turns that each contestant takes: 5")
    parser.add_argument("--clients", help="of the fan-out: 1,100,1000,4000")
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs")
    options = parser.parse_args()
    sizes = TINY if options.tiny else Sizes()
    if options.rounds:
        sizes = dataclasses.replace(sizes, rounds=options.rounds)
    if options.clients:
        sizes = dataclasses.replace(
            sizes, clients=tuple(int(number) for number in options.clients.split(","))
        )
    print(f"{versions()}. Median of {sizes.rounds} rounds (ratio to ours).\n")
    for part in options.part or PARTS:
        print(f"**{part}**\n")
        PARTS[part](sizes)
    progress("")


if __name__ == "__main__":
    main()
