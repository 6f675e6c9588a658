"""Faults and hostile input, each beside a healthy client that must notice nothing.

What one message, one option or one line of output must be is left to the other modules. A test
begins with the number of its fault. SEED repeats a failure; LONG_TESTS=1 takes the full time.
"""

import asyncio
import contextlib
import io
import itertools
import json
import logging
import os
import random
import re
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import unittest
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import urlsplit

from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.testing import gen_test
from tornado.websocket import websocket_connect

import client
import server
from client import BetaBinomial, WebSocketClient
from tests import faults
from tests.faults import LONG, SEED, FakeServer, Fault, Proxy, Stream, following, raw, serving
from tests.support import PairCase, Recorder, first_line, running, until

ANYWHERE = ("--port", "0", "--address", "127.0.0.1")


def message(epoch: str | None, offset: int, samples: list[int]) -> bytes:
    """Make a message of the protocol."""
    text = json.dumps({"epoch": epoch, "offset": offset, "samples": samples})
    return faults.text(text.encode())


class FaultCase(PairCase):
    """A test that leaves no task, and in the log no traceback."""

    def setUp(self) -> None:
        super().setUp()
        random.seed(SEED)

    def tearDown(self) -> None:
        self.io_loop.run_sync(lambda: until(lambda: len(asyncio.all_tasks()) == 1))  # this one
        super().tearDown()

    @contextlib.asynccontextmanager
    async def healthy(self, **options: Any) -> AsyncIterator[Stream]:
        """Serve; in the end the healthy client must have seen every sample in order."""
        async with serving(**options) as stream:
            yield stream
            await self.whole(stream.control, stream)

    async def whole(self, client: Recorder, stream: Stream) -> None:
        """Wait until a client has caught up: it must have seen every sample in order."""
        await faults.caught_up(stream, client)
        self.assertEqual((client.samples, client.missed), (stream.samples, 0))


class NetworkTests(FaultCase):
    """Connections that break, stall, dribble and lag, and names that mean nothing."""

    @gen_test(timeout=120)
    async def test_broken_and_slow_connections(self) -> None:
        """N2 to N5, N9 to N11, R15: a client behind each of these faults gets all, once."""
        cases = {
            "N2, reset": (Fault(life=0.05, ending="reset"), 10),
            "N3, cut inside a frame": (Fault(life=0.05, ending="cut"), 10),
            "N4, closed without a Close frame": (Fault(life=0.05), 10),
            "N5, stalled, then reset": (Fault(life=0.05, ending="stall"), 3),
            "N9, in trickles of 512 bytes": (Fault("trickle"), 1),
            "N10, in slices of one byte": (Fault("slices"), 1),
            "N11, late by 50 ms, with jitter": (Fault("latency", life=0.3, ending="reset"), 4),
        }
        async with self.healthy(history_size=100_000) as stream:
            for name, case in cases.items():
                with self.subTest(name, SEED=SEED):
                    await self.endure(stream, *case)
            stream.send(10_000)
            with self.subTest("R15, cut before the backlog is through", SEED=SEED):
                await self.endure(stream, Fault(ending="cut", size=31_000), 3)

    async def endure(self, stream: Stream, fault: Fault, connections: int) -> None:
        """Let a client suffer a fault for so many connections at least."""
        async with (
            Proxy(stream.url, itertools.repeat(fault)) as proxy,
            following(client := Recorder(proxy.url)),
        ):
            await until(lambda: client.epoch)
            end = stream.end + 200
            await stream.flow(lambda: stream.end >= end and proxy.connections >= connections)
            await self.whole(client, stream)

    @gen_test(timeout=120)
    async def test_what_localhost_means(self) -> None:
        """N13: a client finds a server that listens on only one of the addresses of localhost."""
        real, addresses = socket.getaddrinfo, ("::1", "127.0.0.1")

        def resolve(host: str, *arguments: Any, **options: Any) -> list[Any]:
            hosts = addresses if host == "localhost" else [host]
            return [found for host in hosts for found in real(host, *arguments, **options)]

        self.enterContext(mock.patch("socket.getaddrinfo", resolve))
        for address in addresses:
            if address == "::1" and not socket.has_dualstack_ipv6():
                self.skipTest("there is no IPv6")
            async with self.healthy(address=address) as stream:
                stream.send(10)
                client = Recorder(f"ws://localhost:{urlsplit(stream.url).port}/websocket")
                async with following(client):
                    await self.whole(client, stream)

    @gen_test(timeout=400)
    async def test_storms(self) -> None:
        """N12: twenty clients that flap lose nothing; with a short history, what they say they do."""
        size: Any = {"seconds": 20, "connections": 25} if LONG else {"seconds": 1, "connections": 2}
        for history in (10_000, 50):
            with self.subTest(history=history, SEED=SEED):
                tally = await faults.storm(**size, history_size=history)
                self.assertEqual((tally.doubled, tally.unsaid, tally.noticed), (0, 0, False))
                self.assertEqual(tally.lost > 0, history == 50)


class ProcessTests(FaultCase):
    """Scripts that are ended, started again, frozen and thawed, or started with nonsense."""

    @gen_test(timeout=120)
    async def test_restarts(self) -> None:
        """N1, P1, P3: twenty clients wait for a server, and see each run from its start to its end."""
        signals = [signal.SIGKILL, signal.SIGTERM] * (5 if LONG else 1)
        with self.assertLogs("client", "WARNING") as logs:
            tally = await faults.bounces(signals=signals, count=20)
        self.assertEqual((tally.lost, tally.doubled, tally.missed, tally.noticed), (0, 0, 0, False))
        log = "\n".join(logs.output)
        self.assertRegex(log, r"cannot connect: .*Connection refused; next try in \d\.\d s\n")
        goodbyes = log.count("closed by the server: 1001 'going away'; next try in")
        self.assertEqual(goodbyes, 20 * signals.count(signal.SIGTERM))

    @gen_test(timeout=400)
    async def test_two_signals_at_once(self) -> None:
        """P16: two signals that come 0 to 3 ms apart always end the server."""
        for _ in range(100 if LONG else 20):
            with self.subTest(SEED=SEED), running("server.py", "--port", "0") as process:
                first_line(process)
                for number in random.choices((signal.SIGTERM, signal.SIGINT), k=2):
                    process.send_signal(number)
                    await asyncio.sleep(random.uniform(0, 0.003))  # the fault itself
                # The second may come when Python has already put the handlers away.
                self.assertIn(
                    await asyncio.to_thread(process.wait), (0, -signal.SIGINT, -signal.SIGTERM)
                )
                self.assertNotIn("Traceback", process.communicate()[1])

    @gen_test(timeout=120)
    async def test_peers_that_never_say_goodbye(self) -> None:
        """N6, P4, P5: one is dropped, by a server that streams or that one SIGTERM or two end."""

        async def signals(count: int) -> None:
            with running("server.py", *ANYWHERE) as process:
                async with raw(first_line(process), faults.request()) as peer:
                    await peer.read_until(b"\r\n\r\n")
                    for _ in range(count):
                        process.send_signal(signal.SIGTERM)
                        await asyncio.sleep(0.1)  # the fault itself
                    self.assertEqual(await asyncio.to_thread(process.wait), 0)
                    self.assertNotIn("Traceback", process.communicate()[1])

        vanished = faults.vanishing(seconds=10 if LONG else 0.2)
        tally, *_ = await asyncio.gather(vanished, signals(1), signals(2))
        self.assertEqual((tally.lost, tally.doubled), (0, 0))

    @gen_test(timeout=120)
    async def test_freezing(self) -> None:
        """P9: a frozen server, client, and both agree with an observer to the last digit."""

        def last_line() -> str:
            return (Path(output.name).read_text(encoding="utf-8").splitlines() or [""])[-1]

        def shown() -> int:
            counts = re.search(r"Beta\((\d+), (\d+)\)", last_line())
            return int(counts[1]) + int(counts[2]) - 2 if counts else 0

        with (
            running("server.py", *ANYWHERE, "--interval", "5") as server,
            tempfile.NamedTemporaryFile("r") as output,
            running("client.py", "--url", url := first_line(server), stdout=output) as client,
        ):
            async with following(observer := WebSocketClient(url, retry_delay=0.01)):
                await until(lambda: "Beta" in last_line())
                for frozen in ((server,), (client,), (server, client)):
                    for process in frozen:
                        process.send_signal(signal.SIGSTOP)
                    # Until its ping has timed out, or for a moment.
                    await asyncio.sleep(32 if LONG and frozen == (client,) else 0.3)
                    for process in frozen:
                        process.send_signal(signal.SIGCONT)
                    goal = observer.position + 50
                    await until(lambda: min(observer.position, shown()) >= goal)  # noqa: B023
                server.send_signal(signal.SIGTERM)
                connected = server.communicate()[1].count(" connected, 2 in all")
                await until(lambda: last_line() == str(observer))
                self.assertEqual(observer.position, sum(observer.posterior) - 2)
                self.assertEqual(connected, 2 if LONG else 1)

    @gen_test(timeout=120)
    async def test_clocks_and_processors(self) -> None:
        """P13, T1, R9: slow sampling, a stepping clock, no processor: offsets go on without a gap."""
        back = 5 if LONG else 0.5  # seconds; the stream may pause for as long
        statements = {
            "P13": "time.sleep(0.03)",
            "T1": f"time.time = lambda: now() + (n >= 20) * (3600 if n >= 40 else -{back})",
            "R9": "pass",
        }
        for row, statement in statements.items():
            code = f"""if True:
                import asyncio, itertools, time, server
                numbers, now = itertools.count(), time.time
                def sample(self):
                    n = next(numbers)
                    {statement}
                    return n
                server.RandomBernoulli.sample = sample
                asyncio.run(server.main())"""
            with self.subTest(row), contextlib.ExitStack() as stack:
                for _ in range(1 + (os.cpu_count() or 1) if row == "R9" else 0):
                    stack.enter_context(running("-c", "while True: pass"))
                process = stack.enter_context(running("-c", code, *ANYWHERE, "--interval", "10"))
                async with following(client := Recorder(first_line(process))):
                    await until(lambda: client.position >= 60)
                self.assertEqual(client.samples, list(range(len(client.samples))))
                self.assertEqual(client.missed, 0)

    def test_options(self) -> None:
        """I7, I9: a URL that can never work, or an option out of range: one line, exit code 2."""
        urls = ["http://localhost:8765/websocket", "localhost:8765/websocket", "localhost", ""]
        urls += ["ws://", "ws://[::1/websocket", "ftp://h/"]
        urls += [f"ws://localhost:{port}/websocket" for port in ("99999", "0", "-1", "x")]
        options = "--port=-1 --port=abc --port=99999 --port= --p=-0.1 --p=1.1 --p=nan --p=inf --p=x"
        options += " --interval=0 --interval=-1 --interval=nan --interval=inf --interval=0.5"
        options += " --batch=0 --batch=-1 --batch=1e3"
        started = AssertionError("started")
        for option in (*options.split(), *(f"--url={url}" for url in urls)):
            with (
                self.subTest(option),
                mock.patch("server.httpserver.HTTPServer", side_effect=started),
                mock.patch("client.WebSocketClient.start", side_effect=started),
                mock.patch("sys.argv", ["script.py", option]),
                contextlib.redirect_stderr(io.StringIO()) as errors,
                self.assertRaises(SystemExit) as end,
            ):
                client.main() if option.startswith("--url") else asyncio.run(server.main())
            self.assertEqual(end.exception.code, 2)
            self.assertRegex(errors.getvalue(), r"^script.py: error: .*\n$")


ENDED = "closed by the server: .*|connection lost"  # what a client says of a connection
ACCEPTED, GOOD = faults.ACCEPTED, b'{"epoch": "e", "offset": 8, "samples": [1]}'
HUGE = ACCEPTED + faults.frame(0x81, bytes(1000), masked=False, length=11 * 2**20)
STATUSES = ["403 Forbidden", "404 Not Found", "500 Oops", "503 too many clients"]
# Who followed one of them would connect more often than there are lines.
STATUSES += [f"{code} There\r\nLocation: HERE" for code in (301, 302, 303, 307, 308)]
REFUSALS = {s: f"HTTP/1.1 {s}\r\nContent-Length: 0\r\n\r\n".encode() for s in STATUSES}
NONSENSE = [b"[]", b"{}", b"x", b"", b"null", b"7", b'"epoch"', b"[" * 100_000, GOOD[:30]]
NONSENSE += [GOOD.replace(name, b"other") for name in (b"epoch", b"offset", b"samples")]
NONSENSE += [GOOD.replace(b"8", n) for n in (b"-1", b"1.5", b"NaN", b"true", b"1" * 5_000)]
NONSENSE += [GOOD.replace(b'"e"', b"1"), GOOD.replace(b"[1]", b'"101"')]
FALSE = [b"garbage\r\n\r\n", b"HTTP/1.1 9\r\n\r\n", b"", ACCEPTED.replace(b"KEY", b"x" * 28)]
FALSE += [ACCEPTED.replace(b"websocket", b"x"), ACCEPTED.partition(b"Sec")[0] + b"\r\n"]
FALSE += [ACCEPTED[:-2] + b"Sec-WebSocket-Extensions: x\r\n\r\n"]
BROKEN = [faults.frame(0x83, b"x", masked=False), faults.text(GOOD.replace(b'"e"', b'"\xff"'))]
BINARY = faults.frame(0x82, GOOD, masked=False)

# The row of the fault, what the client says, and what a false server answers.
LIES = [
    ("W16", "cannot connect: Non-websocket response", b"HTTP/1.1 200 OK\r\n\r\n"),
    *(
        ("W16, S9", f"cannot connect: HTTP {status[:3]}: {status[4:9]}.*", reply)
        for status, reply in REFUSALS.items()
    ),
    *(("W17", f"cannot connect: .*|{ENDED}", reply) for reply in FALSE),
    *(
        ("W18", "cannot understand .*", ACCEPTED + said + faults.text(GOOD))
        for said in (BINARY, *map(faults.text, NONSENSE))
    ),
    *(("W18", ENDED, ACCEPTED + said + faults.text(GOOD)) for said in BROKEN),
    ("W22", ENDED, HUGE),
]


class BarrageTests(FaultCase):
    """What hostile clients send, and what hostile servers answer."""

    @gen_test(timeout=120)
    async def test_hostile_clients(self) -> None:
        """W1, W3, W6, W13, W14, I1, I3, S1, S5, S8: each gets its answer, and others all samples."""

        def answered(case: faults.Case, outcome: str) -> None:
            with self.subTest(f"{case.row}: {case.data[:60]!r} ... {case.data[-60:]!r}", SEED=SEED):
                self.assertRegex(outcome, f"^({case.expected})$")

        cases = [*faults.CASES, *faults.random_cases(200)]
        tally = await faults.barrage(cases=cases, answered=answered)
        self.assertEqual((tally.samples, tally.lost, tally.doubled), (len(cases), 0, 0))

    # Tornado has a traceback for a handshake that it cannot accept, which client.py mutes, too.
    @mock.patch.object(logging.getLogger("tornado.application"), "disabled", True)
    @gen_test(timeout=120)
    async def test_hostile_servers(self) -> None:
        """W16, W17, W18, W22, S9: each try costs one line, counts nothing, and doubles the wait."""
        for row, expected, reply in LIES:
            with self.subTest(f"{row}: {reply[:50]!r} ... {reply[-100:]!r}"):
                goodbyes = await self.believe(reply, expected, hold=row in ("W18", "W22"))
                self.assertTrue(row != "W22" or goodbyes[0].startswith("1009"))

    @gen_test(timeout=240)
    async def test_silent_servers(self) -> None:
        """N7, N8: silence after a handshake, or in the middle of it, is noticed, and costs as much."""
        hurry = 1 if LONG else 50  # the limits are ten seconds each

        def connect(request: HTTPRequest, **options: Any) -> Any:
            request.request_timeout = (request.request_timeout or 0) / hurry
            options["ping_interval"] /= hurry
            return websocket_connect(request, **options)

        self.enterContext(mock.patch("tornado.websocket.websocket_connect", connect))
        timeout = "cannot connect: Timeout .*"
        await self.believe(ACCEPTED, f"{ENDED}|{timeout}", hold=True, tries=2)
        for half in (b"", ACCEPTED[:40]):
            await self.believe(half, timeout, hold=True, tries=2)

    async def believe(self, reply: bytes, expected: str, hold: bool, tries: int = 6) -> list[str]:
        """Let a client that stands at offset 8 meet a false server; return its goodbyes."""
        client = WebSocketClient("ws://localhost", retry_delay=0.01)
        client.posterior, client.epoch, client.position = BetaBinomial(3, 2), "e", 8
        with (
            mock.patch("random.uniform", return_value=0.0) as uniform,
            self.assertLogs("client", "WARNING") as logs,
        ):
            async with FakeServer(itertools.repeat(reply), hold=hold) as fake:
                client.url = fake.url
                async with following(client):
                    await until(lambda: len(logs.output) >= tries, timeout=90 if LONG else 30)
        self.assertIn(fake.connections - len(logs.output), (0, 1))
        waits = [call.args for call in uniform.call_args_list]
        self.assertEqual(waits[:tries], [(0, 0.01 * 2**attempt) for attempt in range(tries)])
        for line in logs.output:
            self.assertRegex(line, rf"^WARNING:client:({expected}); next try in 0\.0 s\Z")
            self.assertLess(len(line), 450)
        self.assertEqual(client.posterior, BetaBinomial(3, 2))
        self.assertEqual((client.epoch, client.position, client.missed), ("e", 8, 0))
        return fake.goodbyes

    @gen_test(timeout=120)
    async def test_flood_of_messages(self) -> None:
        """S9, R13, R14: what a busy client cannot take, 12 MB, waits, and comes in larger lists."""
        free = threading.Event()

        class Busy(Recorder):
            def on_message(self, samples: list[Any]) -> None:
                super().on_message(samples)
                free.wait()

        async with self.healthy(message_size=1) as stream:
            stream.sample = "{:030000}".format
            busy = Busy(stream.url)
            busy.start()
            try:
                stream.send()
                await until(lambda: busy.calls)
                for _ in range(400):  # more than the kernel's buffers, or one message, can hold
                    stream.send()
                await until(lambda: stream.control.position >= stream.end)
                self.assertEqual(sum(one.position < stream.end for one in stream.server.clients), 1)
                free.set()
                await self.whole(busy, stream)
                self.assertLess(busy.calls, stream.end)  # which is the number of messages
                async with following(late := Recorder(stream.url)):
                    await self.whole(late, stream)
            finally:
                free.set()
                await asyncio.to_thread(busy.stop)


class Count(NamedTuple):
    """What a client has counted."""

    epoch: str | None = None
    position: int = 0
    missed: int = 0
    samples: tuple[int, ...] = ()

    def take(self, epoch: str, offset: int, samples: list[int]) -> list["Count"]:
        """Return what is counted before the samples of a message, and after them."""
        position = offset if self.epoch is None else self.position if epoch == self.epoch else 0
        missed = self.missed + len(range(position, offset))
        position = max(position, offset)
        new = [sample for n, sample in enumerate(samples, offset) if n >= position]
        return [
            Count(epoch, position, missed, self.samples),
            Count(epoch, position + len(new), missed, (*self.samples, *new)),
        ]


class HistoryTests(FaultCase):
    """The client's rule, against a count that goes sample by sample."""

    @gen_test(timeout=120)
    async def test_random_histories(self) -> None:
        """W19: overlaps, repeats, gaps, restarts and nonsense over 300 connections count exactly."""
        counts = [Count()]  # one of them is the client's

        def replies() -> Iterator[bytes]:
            while True:
                place = re.findall(r"\?epoch=(.*)&offset=(\d+) ", fake.heads[-1])
                epoch, position = place[0] if place else (None, 0)
                counts[:] = [c for c in counts if (c.epoch, c.position) == (epoch, int(position))]
                if len(fake.heads) > 300:
                    yield ACCEPTED + message(counts[-1].epoch, counts[-1].position, [])
                yield ACCEPTED + b"".join(self.history(counts))

        fake = FakeServer(replies(), hold=True)
        with self.subTest(SEED=SEED), mock.patch("random.uniform", return_value=0.0):
            async with fake, following(client := Recorder(fake.url)):
                await until(lambda: len(fake.heads) > 300 or self.tracebacks.found, timeout=90)
            self.assertEqual(tuple(client.samples), counts[-1].samples)
            self.assertEqual(client.missed, counts[-1].missed)

    def history(self, counts: list[Count]) -> Iterator[bytes]:
        """Yield random messages, and leave in the list what a client may then have counted."""
        count = counts[-1]  # IndexError: the client stands where it cannot
        run, size = int(count.epoch or "0"), 0
        end = count.position if count.epoch else random.choice((0, 1000))
        for _ in range(random.randrange(1, 10)):
            again, behind = max(0, end - size), max(0, end - random.randrange(40))
            offset = random.choice((*[end] * 5, again, behind, end + random.randrange(40)))
            if random.random() < 0.1:
                run, offset = run + 1, random.choice((0, 0, 3, 40))
            if random.random() < 0.1:
                yield faults.text(b"nonsense")
                return  # what came just before it may be asked for again
            size = random.choice((0, 1, 1, 2, 5, 30))
            end = offset + size
            samples = [run * 1_000_000 + number for number in range(offset, end)]
            yield message(f"{run:08}", offset, samples)
            counts += counts[-1].take(f"{run:08}", offset, samples)
        yield faults.frame(0x88, b"\x03\xe9", masked=False)  # 1001: all of it has been taken
        del counts[:-1]


class ResourceTests(FaultCase):
    """Crowds, peers that never read, silence, and too little of everything."""

    @gen_test(timeout=120)
    async def test_peers_that_never_read(self) -> None:
        """R1: ten peers that never read a fast stream cost the server no memory."""
        seconds, batch = (30, 200) if LONG else (1.5, 1000)
        growth, client = await faults.never_reading(seconds=seconds, batch=batch)
        self.assertLess(growth, 5)
        # At this rate the history is short, for a healthy client as well.
        first, *_, last = client.samples
        self.assertEqual(last + 1 - first - len(client.samples), client.missed)

    @gen_test(timeout=300)
    async def test_connections_made_and_dropped(self) -> None:
        """R16: thousands of them cost the server at most 4 MB of memory, and no descriptor."""
        with running("server.py", *ANYWHERE, stderr=subprocess.DEVNULL) as process:
            url = first_line(process)
            files = Path(f"/proc/{process.pid}/fd")
            count = len(list(files.iterdir()))

            async def visit() -> None:
                async with raw(url, faults.request()) as peer:
                    await peer.read_until(b"\r\n\r\n")

            grown = []
            for number in (3_000, 26_000 if LONG else 3_000):  # the first are what the heap needs
                for _ in range(number // 50):
                    await asyncio.gather(*(visit() for _ in range(50)))
                await until(lambda: len(list(files.iterdir())) == count)
                grown.append(faults.memory(process))
            self.assertLess(grown[1], grown[0] + 4)

    @gen_test(timeout=120)
    async def test_crowd(self) -> None:
        """R3: 500 clients come at once, catch up from offset 0, and leave no open file behind."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = 4096 if hard == resource.RLIM_INFINITY else min(4096, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        files = len(os.listdir("/dev/fd"))
        tally = await faults.crowd(late=1_000)
        await until(lambda: len(os.listdir("/dev/fd")) <= files)
        self.assertEqual((tally.lost, tally.doubled, tally.missed), (0, 0, 0))

    @gen_test(timeout=120)
    async def test_silent_connections(self) -> None:
        """R6: a connection whose request never comes whole is closed after a while."""
        hurry = 1 if LONG else 20  # the limits are ten seconds each

        def hurried(app: Any, ssl_options: Any, **limits: float) -> HTTPServer:
            shorter: Any = {name: limit / hurry for name, limit in limits.items()}
            return HTTPServer(app, ssl_options=ssl_options, **shorter)

        async def dropped(begin: bytes, pause: float) -> None:
            async with raw(stream.url, begin) as peer:
                end = asyncio.ensure_future(peer.read_until_close())
                with contextlib.suppress(StreamClosedError):
                    while pause and not end.done():
                        await peer.write(b"x")
                        await asyncio.sleep(pause)
                await end

        body = f"{faults.POST}\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n".encode()
        with mock.patch("server.httpserver.HTTPServer", hurried):
            async with self.healthy() as stream:
                slow = itertools.product((b"", faults.PLAIN[:-2] + b"X: ", body), (0, 1 / hurry))
                await asyncio.gather(*(dropped(*case) for case in slow))

    @gen_test(timeout=120)
    async def test_blocked_outputs(self) -> None:
        """R7: neither script stops while nobody reads its standard output; SIGTERM ends both."""
        source, sink = os.pipe()
        self.addCleanup(os.close, source)
        self.addCleanup(os.close, sink)
        with running("server.py", *ANYWHERE, "--interval", "5", stdout=sink) as server:
            url = os.read(source, 1000).decode().rstrip("\n")
            os.set_blocking(sink, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(sink, bytes(1))
            os.set_blocking(sink, True)
            with running("client.py", "--url", url, stdout=sink) as client:
                assert client.stderr
                async with following(observer := WebSocketClient(url)):
                    await until(lambda: observer.position >= 100)
                self.assertIn("connected to", client.stderr.readline())
                server.terminate()
                self.assertEqual(await asyncio.to_thread(server.wait), 0)
                self.assertIn("1001", client.stderr.readline())
                client.terminate()
                self.assertEqual(await asyncio.to_thread(client.wait), -signal.SIGTERM)


if __name__ == "__main__":
    unittest.main()
