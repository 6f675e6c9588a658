"""Faults and hostile input, each beside a healthy client that must notice nothing.

What one message, one option or one line of output must be is left to the other modules.
SEED repeats a failure; LONG_TESTS=1 takes the full time.
"""

import asyncio
import contextlib
import fcntl
import gc
import itertools
import json
import logging
import os
import random
import re
import resource
import signal
import socket
import sys
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from subprocess import DEVNULL
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from tornado.httpclient import HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.iostream import StreamClosedError
from tornado.testing import gen_test
from tornado.websocket import websocket_connect

from client import BetaBinomial, WebSocketClient
from tests import faults
from tests.faults import LONG, SEED, FakeServer, Fault, Stream, following, raw, serving
from tests.support import PairCase, Recorder, first_line, running, until

ANYWHERE = ("--port", "0", "--address", "127.0.0.1")
HURRY = 1 if LONG else 20  # by how much limits of ten seconds are shortened


class FaultCase(PairCase):
    """A test whose random faults can be repeated."""

    def setUp(self) -> None:
        super().setUp()
        random.seed(SEED)

    @contextlib.asynccontextmanager
    async def healthy(self, **options: Any) -> AsyncIterator[Stream]:
        """Serve; in the end the healthy client must have seen every sample in order."""
        async with serving(**options) as stream:
            yield stream
            await faults.caught_up(stream, stream.control)
            self.assertEqual(stream.control.samples, [*range(stream.end)])


@unittest.skipUnless(sys.platform == "linux", "needs /proc")
class StreamTests(FaultCase):
    """Links that break, dribble and lag, and scripts that are ended, frozen, crowded or starved."""

    @gen_test(timeout=900)
    async def test_families(self) -> None:
        """Whatever breaks, no sample is lost, or only what the client reports as missed."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        links = [  # each for so many connections
            ("reset", 10, Fault(life=0.05, ending="reset")),
            ("cut inside a frame", 10, Fault(life=0.05, ending="cut")),
            ("closed without a Close frame", 10, Fault(life=0.05)),
            ("stalled, then reset", 3, Fault(life=0.05, ending="stall")),
            ("in trickles of 512 bytes", 1, faults.TRICKLE),
            ("in slices of one byte", 1, Fault(piece=1)),
            ("late by 50 ms, with jitter", 4, Fault(pause=0.05, life=0.3, ending="reset")),
            ("cut before the backlog is through", 3, Fault(512, ending="cut", size=8_000)),
        ]
        one = partial(faults.storm, count=1, late=3_000, seconds=3.2)
        size: Any = {"seconds": 20, "connections": 25} if LONG else {"seconds": 1, "connections": 2}
        ends = [signal.SIGKILL, signal.SIGTERM] * (5 if LONG else 1)
        rate: Any = {"seconds": 30, "batch": 200} if LONG else {"seconds": 1.5, "batch": 1000}
        families: dict[str, Callable[[faults.Pattern], Any]] = {
            "restarts": partial(faults.bounces, signals=ends, count=20),
            "vanishing": partial(faults.vanishing, seconds=10 if LONG else 0.2, times=1),
            "flapping": partial(faults.storm, **size),
            "with a short history": partial(faults.storm, **size, history_size=50),
            "never reading": partial(faults.never_reading, **rate),
            "a crowd": partial(faults.crowd, late=1_000),
        }
        for name, connections, fault in links:
            families[name] = partial(one, connections=connections, fault=fault)
        for name, family in families.items():
            with self.subTest(name, SEED=SEED):
                files = len(os.listdir("/dev/fd"))
                tally = await family(faults.PAIR)
                self.assertEqual((tally.doubled, tally.unsaid, tally.noticed), (0, 0, False))
                self.assertLess(tally.growth, 5)
                if not name.startswith("never"):
                    self.assertEqual(tally.lost > 0, "short" in name)
                gc.collect()  # closes the sockets that Tornado leaves open after a broken handshake
                await until(lambda: len(os.listdir("/dev/fd")) <= files)  # noqa: B023

    @gen_test(timeout=120)
    async def test_what_localhost_means(self) -> None:
        """A client finds a server that listens on only one of the addresses of localhost."""
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
                    await until(lambda: client.samples == [*range(10)])  # noqa: B023

    @gen_test(timeout=400)
    async def test_signals(self) -> None:
        """A server ends though its peer says no goodbye, or two signals come at once."""
        cases = [([signal.SIGTERM], faults.request())]
        for _ in range(100 if LONG else 8):
            cases.append((random.choices((signal.SIGTERM, signal.SIGINT), k=2), b""))
        for signals, data in cases:
            with self.subTest(SEED=SEED), running("server.py", *ANYWHERE) as process:
                async with raw(first_line(process), data) as peer:
                    if data:
                        await peer.read_until(b"\r\n\r\n")
                    for number in signals:
                        process.send_signal(number)
                        await asyncio.sleep(random.uniform(0, 0.003))  # the fault itself
                    status = await asyncio.to_thread(process.wait)
                # The second may come when Python has already put the handlers away.
                self.assertIn(status, (0, *(-number for number in signals[1:])))
                self.assertNotIn("Traceback", process.communicate()[1])

    @gen_test(timeout=120)
    async def test_freezing(self) -> None:
        """A frozen server, client, and both agree with an observer to the last digit."""
        line = "Beta(1, 1)"

        def trials() -> int:
            return sum(map(int, re.findall(r"\d+", line)[:2])) - 2

        with (
            running("server.py", *ANYWHERE, "--interval", "5") as server,
            running("client.py", "--url", url := first_line(server), stderr=DEVNULL) as client,
        ):
            async with following(observer := WebSocketClient(url, retry_delay=0.01)):
                for frozen in ((), (server,), (client,), (server, client)):
                    for process in frozen:
                        process.send_signal(signal.SIGSTOP)
                    # Until its ping has timed out, or for a moment.
                    await asyncio.sleep(32 if LONG and frozen == (client,) else 0.3)
                    for process in frozen:
                        process.send_signal(signal.SIGCONT)
                    goal = observer.position + 50
                    while trials() < goal:
                        line = await asyncio.to_thread(first_line, client)
                server.terminate()
                _, log = await asyncio.to_thread(server.communicate)
                while line != str(observer):
                    line = await asyncio.to_thread(first_line, client)
                self.assertEqual(observer.position, trials())
                self.assertEqual(log.count(" connected, 2 in all"), 2 if LONG else 1)

    @gen_test(timeout=120)
    async def test_clocks_and_processors(self) -> None:
        """Slow sampling, a clock that steps, no free processor: no number is skipped."""
        back = 5 if LONG else 0.5  # seconds; the stream may pause for as long
        code = f"""if True:
            import asyncio, itertools, time, server
            numbers, now = itertools.count(), time.time
            def sample(self):
                n = next(numbers)
                time.sleep(0.03 if n < 20 else 0)
                time.time = lambda: now() + (n >= 40) * (3600 if n >= 60 else -{back})
                return n
            server.RandomBernoulli.sample = sample
            asyncio.run(server.main())"""
        with contextlib.ExitStack() as stack:
            for _ in range(1 + (os.cpu_count() or 1)):
                stack.enter_context(running("-c", "while True: pass"))
            process = stack.enter_context(running("-c", code, *ANYWHERE, "--interval", "10"))
            async with following(client := Recorder(first_line(process))):
                await until(lambda: client.position >= 80)
            self.assertEqual((client.samples, client.missed), ([*range(client.position)], 0))

    @gen_test(timeout=600)
    async def test_connections_made_and_dropped(self) -> None:
        """They leave no descriptor open; thousands cost the server at most 4 MB of memory."""
        with running("server.py", *ANYWHERE, stderr=DEVNULL) as process:
            url = first_line(process)
            files = f"/proc/{process.pid}/fd"
            count = len(os.listdir(files))

            async def visit() -> None:
                async with raw(url, faults.request()) as peer:
                    await peer.read_until(b"\r\n\r\n")

            sizes = []
            for number in (3_000, 26_000) if LONG else (500,):  # 3,000 are what the heap needs
                for _ in range(number // 50):
                    await asyncio.gather(*(visit() for _ in range(50)))
                await until(lambda: len(os.listdir(files)) == count)
                sizes.append(faults.memory(process))
            if LONG:
                self.assertLess(sizes[1], sizes[0] + 4)

    @gen_test(timeout=120)
    async def test_silent_connections(self) -> None:
        """A connection whose request never comes whole is closed after a while."""

        def hurried(app: Any, ssl_options: Any, **limits: float) -> HTTPServer:
            shorter: Any = {name: limit / HURRY for name, limit in limits.items()}
            return HTTPServer(app, ssl_options=ssl_options, **shorter)

        async def dropped(begin: bytes) -> None:
            async with raw(stream.url, begin) as peer:
                end = asyncio.ensure_future(peer.read_until_close())
                with contextlib.suppress(StreamClosedError):
                    while begin and not end.done():
                        await peer.write(b"x")
                        await asyncio.sleep(1 / HURRY)
                await end

        head = faults.PLAIN[:-2] + b"X: "
        body = faults.request("Content-Length: 99999", line=faults.POST)
        with mock.patch("server.httpserver.HTTPServer", hurried):
            async with self.healthy() as stream:
                await asyncio.gather(*map(dropped, (b"", head, body)))

    @gen_test(timeout=120)
    async def test_blocked_outputs(self) -> None:
        """Neither script stops while nobody reads its standard output; SIGTERM ends both."""
        source, sink = os.pipe()
        lines = self.enterContext(os.fdopen(source))
        self.addCleanup(os.close, sink)
        with running("server.py", *ANYWHERE, "--interval", "5", stdout=sink) as server:
            url = lines.readline().rstrip("\n")
            os.write(sink, bytes(fcntl.fcntl(sink, fcntl.F_GETPIPE_SZ)))  # which fills it
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


ENDED = "closed by the server: .*|connection lost"  # what a client says of a connection
ACCEPTED, GOOD = faults.ACCEPTED, b'{"epoch": "e", "offset": 8, "samples": [1]}'
HUGE = ACCEPTED + faults.frame(0x81, bytes(1000), masked=False, length=11 * 2**20)
STATUSES = ["403 Forbidden", "404 Not Found", "500 Oops", "503 too many clients"]
# Who followed one of them would connect more often than there are lines.
STATUSES += [f"{code} There\r\nLocation: /" for code in (301, 302, 303, 307, 308)]
FALSE = [b"garbage\r\n\r\n", b"HTTP/1.1 9\r\n\r\n", b"", ACCEPTED.replace(b"KEY", b"x" * 28)]
FALSE += [ACCEPTED.replace(b"websocket", b"x"), ACCEPTED.partition(b"Sec")[0] + b"\r\n"]
FALSE += [ACCEPTED[:-2] + b"Sec-WebSocket-Extensions: x\r\n\r\n"]
BROKEN = [faults.frame(0x83, b"x", masked=False), faults.text(GOOD.replace(b'"e"', b'"\xff"'))]
TIMEOUT = "cannot connect: Timeout .*"

# What is wrong, what the client says, and what a false server answers.
LIES = [
    ("silence", f"{ENDED}|{TIMEOUT}", ACCEPTED),
    *(("half", TIMEOUT, half) for half in (b"", ACCEPTED[:40])),
    ("HTTP", "cannot connect: Non-websocket response", b"HTTP/1.1 200 OK\r\n\r\n"),
    *(
        ("HTTP", f"cannot connect: HTTP {s[:3]}: {s[4:9]}.*", f"HTTP/1.1 {s}\r\n\r\n".encode())
        for s in STATUSES
    ),
    *(("head", f"cannot connect: .*|{ENDED}", reply) for reply in FALSE),
    *(("frame", ENDED, ACCEPTED + said + faults.text(GOOD)) for said in BROKEN),
    ("size", ENDED, HUGE),
]


class BarrageTests(FaultCase):
    """What hostile clients send, and what hostile servers answer."""

    @gen_test(timeout=240)
    async def test_hostile_clients(self) -> None:
        """Each gets its answer, and the healthy client all samples."""
        async with self.healthy() as stream:
            for case in (*faults.CASES, *faults.random_cases()):
                stream.send()
                with self.subTest(expected=case.expected, data=case.data[:300], SEED=SEED):
                    outcome = await faults.provoke(stream, case)
                    self.assertRegex(outcome, f"^({case.expected})$")

    # Tornado has a traceback for a handshake that it cannot accept, which client.py mutes, too.
    @mock.patch.object(logging.getLogger("tornado.application"), "disabled", True)
    @gen_test(timeout=400)
    async def test_hostile_servers(self) -> None:
        """Each try is one line, is bounded at 10 s, counts nothing, doubles the wait."""
        hurry = 1

        def connect(request: HTTPRequest, **options: Any) -> Any:
            limits = request.connect_timeout, request.request_timeout, options["ping_interval"]
            self.assertEqual(limits, (10, 10, 10))
            request.request_timeout = (request.request_timeout or 0) / hurry
            options["ping_interval"] /= hurry
            return websocket_connect(request, **options)

        self.enterContext(mock.patch("tornado.websocket.websocket_connect", connect))
        uniform = self.enterContext(mock.patch("random.uniform", return_value=0.0))
        for row, expected, reply in LIES:
            hurry, tries = (HURRY, 2) if row in ("silence", "half") else (1, 6)
            uniform.reset_mock()
            fake = FakeServer(itertools.repeat(reply), hold=row not in ("HTTP", "head"))
            client = WebSocketClient(fake.url, retry_delay=0.01)
            client.posterior, client.epoch, client.position = BetaBinomial(3, 2), "e", 8
            with self.subTest(f"{row}: {reply[:50]!r} ... {reply[-100:]!r}"):
                with contextlib.closing(fake), self.assertLogs("client", "WARNING") as logs:
                    async with following(client):
                        await until(lambda: len(logs.output) >= tries)  # noqa: B023
                self.assertIn(len(fake.streams) - len(logs.output), (0, 1))
                waits = [call.args for call in uniform.call_args_list[:tries]]
                self.assertEqual(waits, [(0, 0.01 * 2**attempt) for attempt in range(tries)])
                for line in logs.output:
                    self.assertRegex(line, rf"^WARNING:client:({expected}); next try in 0\.0 s\Z")
                    self.assertLess(len(line), 450)
                self.assertEqual(client.posterior, BetaBinomial(3, 2))
                self.assertEqual((client.epoch, client.position, client.missed), ("e", 8, 0))
                self.assertTrue(row != "size" or fake.goodbyes[0].startswith("1009"))

    @gen_test(timeout=120)
    async def test_random_histories(self) -> None:
        """Overlaps, repeats, gaps, restarts and nonsense on 300 connections count exactly."""
        counts: list[Any] = [(None, 0, 0, [])]  # epoch, position, missed, samples

        def replies() -> Iterator[bytes]:
            while True:
                count = (client.epoch, client.position, client.missed, [*client.samples])
                self.assertIn(count, counts)  # or there is a traceback
                counts[:] = [count]
                yield ACCEPTED + b"".join(self.history(counts))

        self.enterContext(mock.patch("random.uniform", return_value=0.0))
        with self.subTest(SEED=SEED), contextlib.closing(FakeServer(replies(), hold=True)) as fake:
            async with following(client := Recorder(fake.url)):
                await until(lambda: fake.streams[300:] or self.tracebacks.found)

    def history(self, counts: list[Any]) -> Iterator[bytes]:
        """Yield random messages, and leave in the list what a client may then have counted."""
        epoch, position, missed, seen = counts[-1]
        run, end, size = int(epoch or "0"), position if epoch else random.choice((0, 1000)), 0
        for _ in range(random.randrange(1, 10)):
            jump = random.choice((*[0] * 5, -size, -random.randrange(40), random.randrange(40)))
            offset = max(0, end + jump)
            if random.random() < 0.1:
                run, offset = run + 1, random.choice((0, 0, 3, 40))
            if random.random() < 0.1:
                yield faults.text(b"nonsense")
                return  # what came just before it may be asked for again
            size = random.choice((0, 1, 1, 2, 5, 30))
            end = offset + size
            samples = [run * 1_000_000 + number for number in range(offset, end)]
            message = {"epoch": str(run), "offset": offset, "samples": samples}
            yield faults.text(json.dumps(message).encode())
            if epoch != str(run):
                epoch, position = str(run), (0 if epoch else offset)
            missed += len(range(position, offset))
            position = max(position, offset)
            counts.append((epoch, position, missed, seen))
            seen = seen + samples[position - offset :]
            position = max(position, end)
            counts.append((epoch, position, missed, seen))
        yield faults.frame(0x88, b"\x03\xe9", masked=False)  # 1001: all of it has been taken
        del counts[:-1]
