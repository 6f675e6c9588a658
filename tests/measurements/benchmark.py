"""What a sample costs, side by side with the libraries that one would take instead.

To add a part, write it and name it in PARTS. To add a library, see contestants.py. The processes
are in measuring.py.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from client import BetaBinomial
from server import RandomBernoulli
from tests.measurements import report
from tests.measurements.chart import Curves, draw
from tests.measurements.contestants import CONTESTANTS, Contestant
from tests.measurements.measuring import (
    LONGEST,
    Load,
    Process,
    Receiver,
    Server,
    connected,
    spent,
    started,
)
from tests.measurements.report import Found, Rounds, Row, memory, processor_time
from tests.measurements.transports import TRANSPORTS, bytes_moved, count_bytes
from tests.programs import line_with, running, url_of

PRESENT = {name: who for name, who in CONTESTANTS.items() if all(map(find_spec, who.modules))}
OURS = {"ours": CONTESTANTS["ours"]}
SENDERS = {name: who for name, who in PRESENT.items() if who.serve}
RECEIVERS = {name: who for name, who in PRESENT.items() if who.receive}
# To await a write, as these two do, stops the stream for everybody.
UNSTOPPED = {name: SENDERS[name] for name in SENDERS if name not in ("aiohttp", "starlette")}
RECONNECTING = {name: who for name, who in PRESENT.items() if name in ("ours", "websockets")}


def overload(who: Contestant, clients: int, rate: int, seconds: float, limit: float) -> Rounds:
    """A source that is faster than sending; three rounds, or one if that is late by a second."""
    label = f"{rate:,} samples/s, {clients} clients"
    for _ in range(3):
        with started(who, clients) as (_, server, loading):
            before = memory(server.pid)
            late, cpu = server.ask(Server.pour, rate, seconds, limit)
            more = memory(server.pid, "VmHWM") - before
            got = loading.ask(Load.taken)
        yield {
            Row(f"{label}: s late"): late,
            Row(f"{label}: % of the samples delivered", 0): 100 * got / clients / rate / seconds,
            Row(f"{label}: us per sample and client", 2, ratio=True): cpu / max(1, got) * 1e6,
            Row(f"{label}: MiB more", 0): more,
        }
        if late > 1:
            return


def fan_out(who: Contestant, clients: int, messages: int, size: int = 1) -> Rounds:
    """One sample to many clients; behind a long one there is a 0, which tells that it has come."""
    what = "one sample" if size == 1 else f"{size // 1_000} kB"
    row = Row(f"send {what} to {clients:,} clients: us per message and client", ratio=True)
    samples = [0] if size == 1 else ["x" * size, 0]
    with started(who, clients) as (_, server, _):
        while True:
            yield {row: server.ask(Server.deliver, samples, messages) / clients * 1e6}


def threads(who: Contestant, calls: int) -> Rounds:
    """Calls of send_message in the event loop's thread and in another, with one client."""
    inside = Row("send_message in the event loop's thread: us per call")
    outside = Row("send_message in another thread: us per call")
    with started(who, 1) as (_, server, _):
        while True:
            yield {
                inside: server.ask(Server.call, calls, False) * 1e6,
                outside: server.ask(Server.call, calls, True) * 1e6,
            }


def receiving(who: Contestant, batch: int, messages: int) -> Rounds:
    """Receive, take apart and count."""
    row = Row(f"receive {batch} in a message: us per sample", 2, ratio=True)
    with started(CONTESTANTS["plain Tornado"], 0) as (port, server, _):
        while True:
            with Process(Receiver) as client:
                server.begin(Server.blast, batch, messages)
                cpu, *_ = client.ask(Receiver.count, who, port, batch * messages)
            server.answer()
            yield {row: cpu / batch / messages * 1e6}


def late_joiner(who: Contestant, samples: int) -> Rounds:
    """A client that lacks the whole history, from its connection until it is up to date."""
    row = Row(f"a client that is {samples:,} samples late: ms until it is up to date")
    with started(who, 0) as (port, server, _):
        server.ask(Server.send, [1] * samples)
        while True:
            with Process(Receiver) as client:
                _, begun, ended = client.ask(Receiver.count, who, port, samples)
            yield {row: (ended - begun) * 1e3}


def arrivals(server: Process, watchers: Process, clients: int, rate: float) -> list[float]:
    """Send until each client has got a sample, and return when each had its first one."""
    begun, firsts = time.perf_counter(), dict[int, float]()
    while len(firsts) < clients:
        if time.perf_counter() > begun + LONGEST:
            sys.exit(f"{len(firsts)} of {clients} clients are there")
        server.ask(Server.send_times, rate, 0.5)
        records = watchers.ask(Receiver.since, begun)
        firsts = {number: at for number, at, _ in reversed(records)}
    return list(firsts.values())


def ages(server: Process, watchers: Process, rate: float, seconds: float) -> list[float]:
    """Send, and return how old each sample was, in ms, when a client got it."""
    begun = time.perf_counter()
    server.ask(Server.send_times, rate, seconds)
    return [(at - sent) * 1e3 for _, at, sent in watchers.ask(Receiver.since, begun)]


def slow_consumer(who: Contestant, seconds: float) -> Rounds:
    """An on_message that takes longer than the time between two messages; one round."""
    row = Row(f"on_message of 20 ms, 500 messages/s: s behind after {seconds:g} s", 2)
    with started(OURS["ours"], 0) as (port, server, _), Process(Receiver) as client:
        client.ask(Receiver.watch, who, port, 1, 0.02)
        arrivals(server, client, 1, 500)
        yield {row: ages(server, client, 500, seconds)[-1] / 1e3}


def delay(who: Contestant, clients: int, rate: int, seconds: float) -> Rounds:
    """How old a sample is when it reaches on_message, at fifty clients among all."""
    label = f"{clients:,} client{'s'[: clients - 1]}, {rate} messages/s: ms of delay"
    watched = min(clients, 50)
    with started(who, clients, places=watched) as (port, server, _):
        while True:
            with Process(Receiver) as watchers:
                watchers.ask(Receiver.watch, who, port, watched)
                arrivals(server, watchers, watched, rate)
                found = sorted(ages(server, watchers, rate, seconds))
            yield {
                Row(f"{label}, median", 2, ratio=True): statistics.median(found),
                Row(f"{label}, 99th percentile", 2, ratio=True): found[int(len(found) * 0.99)],
            }


def transport(who: Contestant, seconds: float) -> Rounds:
    """What it takes to move 100 samples/s by a transport, each in a message of its own."""
    while True:
        with started(who, 0) as (port, server, _), Process(Receiver) as client:
            client.ask(Receiver.watch, who, port, 1)
            arrivals(server, client, 1, 100)
            server.ask(count_bytes)
            before = server.ask(spent), client.ask(spent)
            found = sorted(ages(server, client, 100, seconds))
            after = server.ask(spent), client.ask(spent)
            size = server.ask(bytes_moved)
        yield {
            Row("bytes per sample", 0): size / len(found),
            Row("us per sample, server", 0): (after[0] - before[0]) / len(found) * 1e6,
            Row("us per sample, client", 0): (after[1] - before[1]) / len(found) * 1e6,
            Row("ms of delay, median"): statistics.median(found),
            Row("ms of delay, 99th percentile"): found[int(len(found) * 0.99)],
        }


def end_to_end(who: Contestant, batch: int, messages: int) -> Rounds:
    """How much of the speed of tossing and counting is left with a network in between."""
    coin = RandomBernoulli(0.72)
    row = Row(f"end to end, {batch:,} in a message: share of the speed without a network", 3)
    with started(who, 0) as (port, server, _):
        while True:
            with Process(Receiver) as client:
                server.begin(Server.toss, batch, messages)
                *_, end = client.ask(Receiver.count, who, port, batch * messages)
            start = server.answer()
            begun, posterior = time.perf_counter(), BetaBinomial()
            for _ in range(messages):
                posterior = posterior.update([coin.sample() for _ in range(batch)])
            yield {row: (time.perf_counter() - begun) / (end - start)}


def idle_client(who: Contestant, clients: int) -> Rounds:
    """What one more client costs that gets nothing but pings; three rounds."""
    for _ in range(3):
        with started(who, 1, pings=True) as (port, server, loading):
            before = memory(server.pid)
            loading.ask(Load.connect, port, server.pid, clients)
            more = memory(server.pid) - before
        yield {Row("an idle client: KiB", ratio=True): more / clients * 1024}


def coming_and_going(who: Contestant, clients: int, seconds: float) -> Rounds:
    """What clients cost the server that connect, stay for a second, and leave."""
    row = Row(f"{clients} clients come and go every second: % of a core", ratio=True)
    with started(who, 0) as (port, server, loading):
        while True:
            before = server.ask(spent)
            loading.ask(Load.come_and_go, port, clients, seconds)
            yield {row: (server.ask(spent) - before) / seconds * 100}


def deaf_client(who: Contestant, seconds: float) -> Rounds:
    """What a client costs that does not read; one round."""
    row = Row(f"a client that does not read: MiB more after {seconds:g} s")
    with started(who, 0) as (port, server, _), connected(port):
        before = memory(server.pid)
        server.ask(Server.send_times, 100, seconds, 21_000)  # messages of 64 kB
        yield {row: memory(server.pid) - before}


def recovery(who: Contestant, clients: int) -> Rounds:
    """How soon all clients are back after a restart, and how suddenly; three rounds."""
    label = f"{clients} clients after a restart"
    for _ in range(3):
        with Process(Receiver) as watchers:
            with started(who, 0) as (port, server, _):
                watchers.ask(Receiver.watch, who, port, clients, 0)
                arrivals(server, watchers, clients, 20)
            with started(who, 0, port=port) as (_, server, _):
                restarted = time.perf_counter()
                times = [at - restarted for at in arrivals(server, watchers, clients, 20)]
        crowd = max(sum(t <= u < t + 0.1 for u in times) for t in times)
        yield {
            Row(f"{label}: s until half are back"): statistics.median(times),
            Row(f"{label}: s until all are back"): max(times),
            Row(f"{label}: most in any 100 ms", 0): crowd,
        }


def both_scripts(who: Contestant, seconds: float) -> Rounds:
    """What the two scripts cost as they are started, with 10 samples/s; one round."""
    with running("server.py", "--port", "0") as server:
        options = "--url", url_of(server)
        with running("client.py", *options, stdout=subprocess.DEVNULL) as client:
            line_with(client, " connected to ")
            scripts = {"server.py": server.pid, "client.py": client.pid}
            before = {script: processor_time(pid) for script, pid in scripts.items()}
            time.sleep(seconds)
            found = {}
            for script, pid in scripts.items():
                label = f"10 samples/s for {seconds:g} s, {script}"
                used = processor_time(pid) - before[script]
                found[Row(f"{label}: % of a core", 2)] = used / seconds * 100
                found[Row(f"{label}: MiB")] = memory(pid)
            yield found


class Part(NamedTuple):
    """What is measured, of whom, and the sizes that it is given: as usual, and if it is tiny."""

    measure: Callable[..., Rounds]
    whom: dict[str, Contestant]
    usual: list[tuple[float, ...]]
    tiny: tuple[float, ...]


PARTS = {
    "overload": Part(
        overload, SENDERS, [(200, 2_000, 2, 5), (200, 10_000, 2, 5)], (5, 2_000, 0.2, 5)
    ),
    "transports": Part(transport, TRANSPORTS, [(3,)], (0.3,)),
    "fan-out": Part(fan_out, SENDERS, [(1_000, 20), (4_000, 5), (100, 20, 10_000)], (20, 5)),
    "threads": Part(threads, OURS, [(5_000,)], (100,)),
    "receiving": Part(receiving, RECEIVERS, [(1, 20_000), (10, 20_000), (100, 20_000)], (10, 100)),
    "slow-consumer": Part(slow_consumer, RECEIVERS, [(10,)], (0.3,)),
    "late-joiner": Part(late_joiner, OURS, [(10_000,)], (100,)),
    "delay": Part(delay, SENDERS, [(1_000, 10, 2), (1, 100, 1)], (5, 50, 0.3)),
    "end-to-end": Part(end_to_end, OURS, [(1, 1_000), (1_000, 1_000)], (50, 20)),
    "idle-client": Part(idle_client, SENDERS, [(1_000,)], (20,)),
    "coming-and-going": Part(coming_and_going, SENDERS, [(100, 5)], (10, 0.5)),
    "deaf-client": Part(deaf_client, UNSTOPPED, [(5,)], (0.3,)),
    "recovery": Part(recovery, RECONNECTING, [(200,)], (3,)),
    "both-scripts": Part(both_scripts, OURS, [(600,)], (0.3,)),
}
OF_THEIR_OWN = "overload", "transports"  # have a table each; the other parts are in one
TABLES = [["overload"], ["transports"], [part for part in PARTS if part not in OF_THEIR_OWN]]


def lateness(rates: Sequence[int], seconds: float, limit: float) -> Curves:
    """Measure how late the last sample is, for each number of samples per second."""
    names = {"ours": "ours", "plain Tornado": "plain loop", "websockets": "websockets.broadcast"}
    whom = {names[name]: who for name, who in SENDERS.items() if name in names}
    curves: Curves = {name: [] for name in whom}
    for rate in rates:
        found = report.take_turns(overload, whom, (200, rate, seconds, limit), 3)
        for name, late in next(iter(found.values())).items():  # the first row
            curves[name].append((rate, statistics.median(late)))
    return curves


def main() -> None:
    """Measure all parts, or those that are named, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="*", choices=[*PARTS, []], help="what to measure: all")
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s, at most")
    parser.add_argument("--tiny", action="store_true", help="only see that everything runs, once")
    parser.add_argument("--chart", type=Path, help="only draw lateness by samples/s into this SVG")
    parser.add_argument("--seconds", type=float, default=600, help="of both-scripts: %(default)s")
    options = parser.parse_args()
    PARTS["both-scripts"].usual[:] = [(options.seconds,)]
    if options.tiny:
        options.rounds = 1
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # open files; other processes inherit it
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    for name in CONTESTANTS.keys() - PRESENT.keys():
        print(f"{name} is left out: it is not installed.\n")
    with report.machine(module for who in PRESENT.values() for module in who.modules):
        if options.chart:
            rates = (20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)
            curves = lateness(rates[-2:], 0.2, 1) if options.tiny else lateness(rates, 2, 20)
            options.chart.write_text(draw(curves, 20), encoding="utf-8")
            return
        for titles in TABLES:
            found: Found = {}
            for part in (PARTS[title] for title in titles if title in (options.part or PARTS)):
                for sizes in [part.tiny] if options.tiny else part.usual:
                    found |= report.take_turns(part.measure, part.whom, sizes, options.rounds)
            if found:
                report.table(found, [*CONTESTANTS, *TRANSPORTS])


if __name__ == "__main__":
    main()
