"""Faults and hostile input, each beside a healthy client that notices nothing.

A test begins with the number of its fault. Samples are their own offsets, so that a lost, doubled
or misplaced one shows. SEED repeats a failure; LONG_TESTS=1 runs the storms at full length.
"""

import asyncio
import collections
import contextlib
import gc
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
import time
import unittest
import unittest.mock
import warnings
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from tornado.httpclient import HTTPRequest
from tornado.testing import AsyncTestCase, bind_unused_port, gen_test
from tornado.websocket import websocket_connect

import client
import server
from client import BetaBinomial, WebSocketClient
from server import WebSocketServer
from tests.faults import (
    CASES,
    LONG,
    SEED,
    FakeServer,
    Fault,
    Proxy,
    Reply,
    Stream,
    Tally,
    accept,
    accept_and_say,
    at,
    barrage,
    bounces,
    canned,
    caught_up,
    close_frame,
    closed,
    crowd,
    ended,
    following,
    frame,
    linger,
    memory,
    never_reading,
    python,
    random_cases,
    read_frame,
    request,
    reserved_port,
    serving,
    serving_numbers,
    storm,
    streamed,
    streaming,
    text,
    vanishing,
)
from tests.support import Recorder, Tracebacks, first_line, fresh_server, running, until

long_test = unittest.skipUnless(LONG, "LONG_TESTS=1 runs it")


class FaultCase(AsyncTestCase):
    """A test of this handler, which leaves no traceback in the log."""

    handler: ClassVar[type[WebSocketServer]] = WebSocketServer

    def setUp(self) -> None:
        super().setUp()
        self.rng = random.Random(SEED)
        self.tracebacks = Tracebacks()
        logging.getLogger().addHandler(self.tracebacks)

    def tearDown(self) -> None:
        async def end() -> None:
            await until(lambda: len(asyncio.all_tasks()) == 1)  # no task but this one is left
            await asyncio.sleep(0)  # a transport that was aborted closes in the next iteration

        self.io_loop.run_sync(end)
        super().tearDown()
        logging.getLogger().removeHandler(self.tracebacks)
        self.assertEqual(self.tracebacks.found, [])

    @contextlib.asynccontextmanager
    async def healthy(self, **options: Any) -> AsyncIterator[Stream]:
        """Serve; in the end a healthy client must have seen every sample in order."""
        async with (
            serving(self.handler, **options) as stream,
            following(control := Recorder(stream.url)),
        ):
            await until(lambda: control.epoch)
            yield stream
            await caught_up(stream, control)
            self.assertEqual(control.samples, stream.samples)

    def report(self, tally: object) -> None:
        """Say in one line what a long test has counted."""
        print(f"{self._testMethodName}: {tally}, SEED={SEED}")


class NetworkTests(FaultCase):
    """Connections that break, stall, dribble and lag."""

    async def endure(self, fault: Fault, connections: int = 10) -> None:
        """Let a client suffer the fault again and again: it sees what the healthy one sees."""
        with self.subTest(SEED=SEED):
            async with (
                self.healthy() as stream,
                Proxy(stream.port, itertools.repeat(fault), self.rng) as proxy,
                following(client := Recorder(proxy.url)),
            ):
                await until(lambda: client.epoch)
                with streaming(stream):
                    await streamed(stream, 200)
                    await until(lambda: proxy.connections >= connections)
                await caught_up(stream, client)
                self.assertEqual(client.samples, stream.samples)
                self.assertEqual(client.missed, 0)

    @gen_test
    async def test_nobody_listens_yet(self) -> None:
        """N1: a client that is there first says so in one line a try, and follows in the end."""
        with reserved_port() as port, self.assertLogs("client", "WARNING") as logs:
            client = Recorder(f"ws://127.0.0.1:{port}/websocket")
            async with following(client):
                await lines(logs, 4)
                async with serving(self.handler, port=port) as stream:
                    stream.send(10)
                    await at(client, 10)
        for line in logs.output[:4]:
            self.assertRegex(line, r"cannot connect: .*Connection refused; next try in 0\.\d s$")

    @gen_test
    async def test_reset(self) -> None:
        """N2: a reset in mid-stream loses and doubles nothing."""
        await self.endure(Fault(life=0.05, ending="reset"))

    @gen_test
    async def test_cut_inside_a_frame(self) -> None:
        """N3: a part of a message is not counted."""
        await self.endure(Fault(life=0.05, ending="cut"))

    @gen_test
    async def test_closed_without_a_close_frame(self) -> None:
        """N4: an end without a goodbye loses and doubles nothing."""
        await self.endure(Fault(life=0.05, ending="close"))

    @gen_test
    async def test_stall(self) -> None:
        """N5: a stall of 0.2 to 0.8 s before a reset loses and doubles nothing."""
        await self.endure(Fault(life=0.05, ending="stall"), connections=3)

    @gen_test
    async def test_vanished_server(self) -> None:
        """N7: a client notices a server that answers no ping, and tries again."""
        options = {"ping_interval": 0.1, "ping_timeout": 0.1}
        with hasty(options, handshake=10), self.assertLogs("client", "WARNING") as logs:
            async with FakeServer(accept, hold=True) as fake, following(Recorder(fake.url)):
                await lines(logs, 2)
        self.assertLessEqual(fake.connections, 1 + len(logs.output))
        for line in logs.output:
            self.assertRegex(line, f"{ENDED}; next try in")

    @gen_test
    async def test_silence_in_the_handshake(self) -> None:
        """N8: a handshake that stops half-way ends after a while, and is tried again."""
        for name, reply in HALF_HANDSHAKES.items():
            with self.subTest(name), hasty({}), self.assertLogs("client", "WARNING") as logs:
                async with FakeServer(reply, deaf=True) as fake, following(Recorder(fake.url)):
                    await lines(logs, 2)
            self.assertLessEqual(fake.connections, 1 + len(logs.output))
            for line in logs.output:
                self.assertRegex(line, "cannot connect: Timeout .*; next try in")

    @long_test
    @gen_test(timeout=120)
    async def test_silence_at_full_length(self) -> None:
        """N6, N7, N8: silence is noticed on both sides by the pings and timeouts as they are."""

        async def retried(reply: Reply) -> None:
            async with FakeServer(reply, deaf=True) as fake, following(Recorder(fake.url)):
                for _ in range(2):  # 25 s, and a condition is polled for up to 30 s
                    with contextlib.suppress(AssertionError):
                        await until(lambda: fake.connections >= 2)
                self.assertGreaterEqual(fake.connections, 2)

        start = time.monotonic()
        silent = [retried(reply) for reply in (accept, *HALF_HANDSHAKES.values())]
        vanished = vanishing(self.handler, Recorder, interval=10)
        tally, _ = await asyncio.gather(vanished, asyncio.gather(*silent))
        self.assertEqual((tally.lost, tally.doubled), (0, 0))
        self.report(f"{tally}, over after {time.monotonic() - start:.0f} s")

    @gen_test
    async def test_trickle(self) -> None:
        """N9: behind 512 bytes every 20 ms, a client gets fewer, larger messages, and all of it."""
        written: collections.Counter[WebSocketServer] = collections.Counter()

        def catch_up(client: WebSocketServer) -> None:
            written[client] += 1
            self.handler.catch_up(client)

        async with (
            self.healthy(buffer=4096, catch_up=catch_up) as stream,
            Proxy(stream.port, itertools.repeat(Fault("trickle")), self.rng, 4096) as proxy,
            following(client := Recorder(proxy.url)),
        ):
            await until(lambda: client.epoch)
            with streaming(stream, batch=300):
                await streamed(stream, 9_900)
            await caught_up(stream, client)
            self.assertEqual(client.samples, stream.samples)
            self.assertLess(min(written.values()), max(written.values()))

    @gen_test
    async def test_one_byte_segments(self) -> None:
        """N10: a stream in slices of one byte loses and doubles nothing."""
        await self.endure(Fault("slices"), connections=1)

    @gen_test
    async def test_latency(self) -> None:
        """N11: 50 ms of latency with jitter lose and double nothing."""
        await self.endure(Fault("latency", life=0.3, ending="reset"), connections=4)

    @gen_test
    async def test_what_localhost_means(self) -> None:
        """N13: a client finds a server that listens on only one of the addresses of localhost."""
        real = socket.getaddrinfo
        addresses = "::1", "127.0.0.1"

        def resolve(host: str, *arguments: Any, **options: Any) -> list[Any]:
            hosts = addresses if host == "localhost" else [host]
            return [found for host in hosts for found in real(host, *arguments, **options)]

        for address in addresses:
            with self.subTest(address), unittest.mock.patch("socket.getaddrinfo", resolve):
                try:
                    socket.create_server((address, 0), family=real(address, 0)[0][0]).close()
                except OSError:
                    self.skipTest(f"{address} is not there")
                async with serving(self.handler, address=address) as stream:
                    client = Recorder(f"ws://localhost:{stream.port}/websocket")
                    async with following(client):
                        stream.send(10)
                        await at(client, 10)

    @gen_test
    async def test_unknown_host(self) -> None:
        """N14: an unknown host costs one line a try."""
        unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        with (
            unittest.mock.patch("socket.getaddrinfo", side_effect=unknown) as resolve,
            self.assertLogs("client", "WARNING") as logs,
        ):
            async with following(Recorder("ws://no-such-host.invalid/")):
                await lines(logs, 4)
        self.assertLessEqual(resolve.call_count, 1 + len(logs.output))
        for line in logs.output:
            self.assertRegex(line, "cannot connect: .*Name or service not known; next try in")


async def last_offset(reader: asyncio.StreamReader) -> int:
    """Read all messages up to the Close frame, 1001, and return the position after the last."""
    position = 0
    while True:
        opcode, payload = await read_frame(reader)
        if opcode == 8:
            if payload != b"\x03\xe9going away":
                raise AssertionError(f"goodbye was {payload!r}")
            return position
        message = json.loads(payload)
        position = message["offset"] + len(message["samples"])


async def lines(logs: Any, count: int) -> None:
    """Wait until so many lines have been logged."""
    await until(lambda: len(logs.output) >= count)


ENDED = "(closed by the server: .*|connection lost)"  # what a client says of a connection

HALF_HANDSHAKES: dict[str, Reply] = {
    "nothing": lambda key: b"",
    "half a 101": lambda key: accept(key)[:40],
}


@contextlib.contextmanager
def hasty(options: dict[str, float], handshake: float = 0.2) -> Iterator[None]:
    """Let the client be patient for less than a second, where it would be for ten."""

    def connect(request: HTTPRequest, *arguments: Any, **usual: Any) -> Any:
        request.connect_timeout = request.request_timeout = handshake
        return websocket_connect(request, *arguments, **usual | options)

    with unittest.mock.patch("tornado.websocket.websocket_connect", connect):
        yield


class StormTests(FaultCase):
    """Twenty clients behind proxies that reset, cut, stall, trickle and slice, all at once."""

    async def weather(self, seconds: float, connections: int, **attributes: Any) -> Tally:
        """Let a storm blow; what is lost has been reported as missed, and nothing is doubled."""
        tally = await storm(self.handler, Recorder, self.rng, seconds, connections, **attributes)
        self.assertEqual((tally.lost, tally.doubled), (tally.missed, 0), f"SEED={SEED}")
        return tally

    @gen_test(timeout=180)
    async def test_storm(self) -> None:
        """N12: twenty clients that flap at 1,000 samples/s lose and double nothing."""
        tally = await self.weather(*((20, 25) if LONG else (1, 2)))
        self.assertEqual(tally.lost, 0)

    @gen_test(timeout=180)
    async def test_storm_with_a_short_history(self) -> None:
        """N12: with a history of 50 samples they lose some, and say exactly how many."""
        tally = await self.weather(*((20, 25) if LONG else (1, 2)), history_size=50)
        self.assertGreater(tally.lost, 0)


class BounceTests(FaultCase):
    """Servers and clients that are ended, started again, frozen and thawed."""

    @gen_test(timeout=120)
    async def test_restarts(self) -> None:
        """P1: after SIGTERM and SIGKILL, each new run is counted from its start, and the old kept."""
        signals = [signal.SIGKILL, signal.SIGTERM] * (5 if LONG else 1)
        tally = await bounces(self.handler, Recorder, signals)
        self.assertEqual((tally.lost, tally.doubled, tally.missed), (0, 0, 0))

    @gen_test
    async def test_new_run_has_rolled_over(self) -> None:
        """P2: a client that comes back to a new run knows how many of its samples are gone."""
        client = Recorder("ws://localhost")
        for expected in (list(range(30)), [*range(30), *range(70, 120)]):
            async with serving(self.handler, history_size=50) as stream:
                client.url = stream.url
                stream.send(30 if not client.samples else 120)
                async with following(client):
                    await until(lambda: client.epoch == stream.server.epoch)
            self.assertEqual(client.samples, expected)
        self.assertEqual(client.missed, 70)

    @gen_test
    async def test_sigterm_with_twenty_clients(self) -> None:
        """P3: SIGTERM ends the stream for all at the same offset, with 1001 and exit code 0."""
        with (
            self.assertLogs("client", "WARNING") as logs,
            running("server.py", "--port", "0", "--interval", "5") as process,
        ):
            url = first_line(process)
            clients = [WebSocketClient(url, retry_delay=0.01) for _ in range(20)]
            async with following(*clients):
                await until(lambda: all(client.position > 50 for client in clients))
                process.send_signal(signal.SIGTERM)
                self.assertEqual(await ended(process), 0)
                goodbye = "closed by the server: 1001 'going away'"
                await until(lambda: sum(goodbye in line for line in logs.output) == 20)
        self.assertEqual(len({client.position for client in clients}), 1)
        self.assertEqual(len({client.posterior for client in clients}), 1)

    @gen_test
    async def test_goodbye_behind_an_unfinished_write(self) -> None:
        """P3: serve tells all 1001 after the same sample, also one that is still written to."""

        def open_narrow(client: WebSocketServer) -> None:
            assert client.ws_connection
            narrow: Any = client.ws_connection.stream
            narrow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            self.handler.open(client)

        stream = Stream(
            fresh_server(self.handler, clients=WebSocketServer.clients, open=open_narrow), 0
        )
        stream.sample = "{:02000}".format
        with contextlib.redirect_stdout(io.StringIO()) as output:
            task = asyncio.ensure_future(
                server.serve(server.make_app(stream.server), 0, "127.0.0.1")
            )
            await until(output.getvalue)
        url = output.getvalue().strip()
        stream.port = int(url.rsplit(":", 1)[1].split("/")[0])
        clients = [Recorder(url) for _ in range(5)]
        with self.assertLogs("client", "WARNING") as logs:
            async with following(*clients):
                await until(lambda: len(stream.server.clients) == 5)
                reader, writer = await asyncio.open_connection("127.0.0.1", stream.port, limit=4096)
                writer.write(request())
                head = await reader.readuntil(b"\r\n\r\n")
                self.assertIn(b"101", head)
                await until(lambda: len(stream.server.clients) == 6)
                stream.send(900)
                await caught_up(stream, *clients)
                self.assertEqual([c.writing for c in stream.server.clients].count(True), 1)
                stream.send(10)
                task.cancel()
                self.assertEqual(await asyncio.wait_for(last_offset(reader), 30), stream.end)
                writer.write(close_frame(1001))
                await asyncio.gather(task, return_exceptions=True)
                await closed(writer)
                goodbye = "closed by the server: 1001 'going away'"
                await until(lambda: sum(goodbye in line for line in logs.output) == 5)
        for one in clients:
            self.assertEqual(one.samples, stream.samples)

    @gen_test(timeout=240)
    async def test_two_signals_at_once(self) -> None:
        """P16: two signals that come 0 to 3 ms apart always end the server."""
        for _ in range(100 if LONG else 20):
            with self.subTest(SEED=SEED), running("server.py", "--port", "0") as process:
                first_line(process)
                for number in self.rng.choices((signal.SIGTERM, signal.SIGINT), k=2):
                    process.send_signal(number)
                    await asyncio.sleep(self.rng.uniform(0, 0.003))  # the fault itself
                # The second may come when Python has already put the handlers away.
                self.assertIn(await ended(process), (0, -signal.SIGINT, -signal.SIGTERM))
                self.assertNotIn("Traceback", process.communicate()[1])

    @gen_test
    async def test_peers_that_never_say_goodbye(self) -> None:
        """N6, P4, P5: one is dropped after 5 s, by a server that streams or that one signal or two end."""
        tally, *_ = await asyncio.gather(
            vanishing(self.handler, Recorder, interval=0.2), self.signals(1), self.signals(2)
        )
        self.assertEqual((tally.lost, tally.doubled), (0, 0))

    async def signals(self, count: int) -> None:
        """Send SIGTERM so often to a server whose one client never answers its goodbye."""
        with running("server.py", "--port", "0", "--address", "127.0.0.1") as process:
            port = int(first_line(process).split(":")[2].split("/")[0])
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request())
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(count):
                process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.1)
            self.assertEqual(await ended(process), 0)
            self.assertNotIn("Traceback", process.communicate()[1])
            await closed(writer)

    def test_interrupted_client(self) -> None:
        """P7: Ctrl-C in mid-stream or in mid-wait prints the last posterior, and nothing else."""
        with (
            reserved_port() as port,
            running("server.py", "--port", "0", "--interval", "5") as server,
        ):
            for url in (first_line(server), f"ws://127.0.0.1:{port}/websocket"):
                with self.subTest(url), running("client.py", "--url", url) as process:
                    assert process.stdout
                    assert process.stderr
                    line = ""
                    if url.endswith(f":{port}/websocket"):
                        self.assertIn("Connection refused", process.stderr.readline())
                    else:
                        while "Beta(1, 1)" in (line := process.stdout.readline()):
                            pass
                    process.send_signal(signal.SIGINT)
                    output, errors = process.communicate()
                    self.assertEqual(process.returncode, 0)
                    self.assertNotIn("Traceback", errors)
                    *_, last = (line + output).splitlines()
                    self.assertRegex(last, r"Beta\(\d+, \d+\) .* missed 0$")

    @gen_test
    async def test_freezing(self) -> None:
        """P9: a frozen server, client, and both agree with an observer to the last digit."""
        with (
            running("server.py", "--port", "0", "--interval", "5") as server,
            tempfile.NamedTemporaryFile("r") as output,
        ):
            url = first_line(server)
            observer = WebSocketClient(url, retry_delay=0.01)
            command = ("client.py", "--url", url)
            with python(*command, stdout=output) as client:
                async with following(observer):
                    await until(lambda: "Beta" in last_line(output.name))
                    for frozen in ((server,), (client,), (server, client)):
                        for process in frozen:
                            process.send_signal(signal.SIGSTOP)
                        await asyncio.sleep(0.3)
                        for process in frozen:
                            process.send_signal(signal.SIGCONT)
                        await at(observer, observer.position + 50)
                    server.send_signal(signal.SIGTERM)
                    await ended(server)
                    await until(lambda: last_line(output.name) == str(observer))
                    self.assertEqual(observer.position, sum(observer.posterior) - 2)

    @long_test
    @gen_test(timeout=120)
    async def test_long_freeze(self) -> None:
        """P9: one of five clients frozen for 32 s comes back; the others never part by more than 2."""
        async with self.healthy() as stream:
            stream.sample = lambda offset: offset * offset % 3
            with contextlib.ExitStack() as stack:
                outputs = [stack.enter_context(tempfile.NamedTemporaryFile("r")) for _ in range(5)]
                names = [output.name for output in outputs]
                frozen, *_ = [
                    stack.enter_context(python("client.py", "--url", stream.url, stdout=output))
                    for output in outputs
                ]
                await until(lambda: len(stream.server.clients) == 6)
                with streaming(stream, interval=100, batch=1):
                    await streamed(stream, 10)
                    frozen.send_signal(signal.SIGSTOP)
                    start = time.monotonic()
                    while time.monotonic() < start + 32:
                        await streamed(stream, 5)
                        await until(lambda: spread(names[1:]) <= 2)
                    self.assertEqual(len(stream.server.clients), 5)  # its ping has timed out
                    frozen.send_signal(signal.SIGCONT)
                    await streamed(stream, 10)
                expected = WebSocketClient(stream.url)
                expected.on_message(stream.samples)
                await until(lambda: all(last_line(name) == str(expected) for name in names))
                self.report(f"{stream.end} samples for each of 5 clients, 0 missed")

    @gen_test
    async def test_write_that_raises(self) -> None:
        """P12: a client that cannot be written to is dropped with one line."""
        for deaf in (False, True):
            with self.subTest(deaf=deaf), self.assertLogs("server", "WARNING") as logs:
                async with self.healthy() as stream, contextlib.AsyncExitStack() as stack:
                    healthy = set(stream.server.clients)
                    if deaf:
                        _, writer = await asyncio.open_connection("127.0.0.1", stream.port)
                        stack.push_async_callback(closed, writer)
                        writer.write(request())
                    else:
                        other = WebSocketClient(stream.url, retry_delay=30)
                        await stack.enter_async_context(following(other))
                    await until(lambda: len(stream.server.clients) == 2)
                    (broken,) = stream.server.clients - healthy
                    broken.write_message = unittest.mock.Mock(side_effect=RuntimeError("broken"))
                    with streaming(stream):
                        await streamed(stream, 200)
                    if not deaf:
                        await until(lambda: len(stream.server.clients) == 1)
            self.assertEqual(len(logs.output), 1, logs.output[:3])
            self.assertIn("RuntimeError('broken')", logs.output[0])

    @gen_test
    async def test_slow_sampling(self) -> None:
        """P13: sampling that takes longer than the interval skips ticks, and offsets go on."""
        await self.count("time.sleep(0.03)", samples=20)

    @gen_test
    async def test_wall_clock(self) -> None:
        """T1: a wall clock that steps back, and forward 1 h, leaves the offsets contiguous."""
        back = 5 if LONG else 0.5  # seconds; the stream may pause for as long
        step = f"time.time = lambda: clock() + (0 if n < 20 else -{back} if n < 40 else 3600)"
        await self.count(step, samples=60)

    async def count(self, statement: str, samples: int) -> None:
        """Run server.py with a statement before each of the samples, which count from 0."""
        code = f"""if True:
            import asyncio, itertools, time, server
            numbers, clock = itertools.count(), time.time
            def sample(self):
                n = next(numbers)
                {statement}
                return n
            server.RandomBernoulli.sample = sample
            asyncio.run(server.main())"""
        with python("-c", code, "--port", "0", "--interval", "10") as process:
            client = Recorder(first_line(process))
            async with following(client):
                await until(lambda: len(client.samples) >= samples)
            self.assertEqual(client.samples, list(range(len(client.samples))))

    def test_port_in_use(self) -> None:
        """P14: a port that is in use costs one line and exit code 1."""
        listener, port = bind_unused_port()
        # Tornado itself leaves a socket unclosed that it cannot bind.
        command = ("-W", "ignore:unclosed:ResourceWarning", "server.py", "--port", str(port))
        with listener, python(*command, stderr=subprocess.PIPE) as process:
            output, errors = process.communicate()
        self.assertEqual((process.returncode, output), (1, ""))
        self.assertRegex(errors, rf"^cannot listen on localhost:{port}: .*in use.*\n$")


def last_line(name: str) -> str:
    """Return the last line of a file, or nothing."""
    return (Path(name).read_text(encoding="utf-8").splitlines() or [""])[-1]


def spread(names: list[str]) -> int:
    """Return by how many trials the clients that print to these files are apart."""
    found = [re.findall(r"Beta\((\d+), (\d+)\)", last_line(name))[0] for name in names]
    trials = [int(alpha) + int(beta) for alpha, beta in found]
    return max(trials) - min(trials)


class BarrageTests(FaultCase):
    """Hostile requests and frames; after each, a healthy client has seen every sample in order."""

    async def provoke(self, *rows: str) -> None:
        """Send all the cases of these rows."""

        def answered(case: Any, outcome: str) -> None:
            with self.subTest(case.name):
                self.assertRegex(outcome, f"^({case.expected})$")

        cases = [case for case in CASES if case.row in rows]
        self.assertTrue(cases)
        await barrage(self.handler, Recorder, cases, answered)

    @gen_test
    async def test_client_that_speaks(self) -> None:
        """W1: a client that sends text, binary or nothing is told that the stream is read-only."""
        await self.provoke("W1")

    @gen_test
    async def test_too_large(self) -> None:
        """W3: a message over 1 KiB, announced or in endless fragments, ends its connection."""
        await self.provoke("W3")

    @gen_test
    async def test_invalid_frames(self) -> None:
        """W6: frames that break RFC 6455 end their own connection."""
        await self.provoke("W6")

    @gen_test
    async def test_random_bytes(self) -> None:
        """W6: neither do 200 random frames, handshakes and noises disturb anybody else."""
        with self.subTest(SEED=SEED):
            await barrage(self.handler, Recorder, list(random_cases(self.rng, 200)))

    @gen_test
    async def test_ping_flood(self) -> None:
        """W13: 20,000 pings of 100 bytes disturb nobody else."""
        await self.provoke("W13")

    @gen_test
    async def test_other_requests(self) -> None:
        """W14: what is not a WebSocket handshake gets 400, 404, 405 or 426."""
        await self.provoke("W14")

    @gen_test
    async def test_invalid_position(self) -> None:
        """I1: a position that cannot be is refused with 400 and the reason."""
        await self.provoke("I1")

    @gen_test
    async def test_unknown_epoch(self) -> None:
        """I3: any other epoch joins at the oldest sample."""
        await self.provoke("I3")
        async with self.healthy(history_size=50) as stream:
            stream.send(30)
            for epoch in ("ffffffff", "e" * 5_000):
                url = f"{stream.url}?epoch={epoch}&offset=7"
                connection = await websocket_connect(url)
                message = json.loads(await connection.read_message() or "")
                self.assertEqual((message["offset"], len(message["samples"])), (0, 30))
                connection.close()

    @gen_test
    async def test_foreign_page(self) -> None:
        """S1: a page of another origin gets 403, one of the server's own gets 101."""
        await self.provoke("S1")

    @gen_test
    async def test_smuggling(self) -> None:
        """S5: oversized and ambiguous requests are refused."""
        await self.provoke("S5")

    @gen_test
    async def test_compression(self) -> None:
        """S8: compression is not negotiated, so that no bomb can be sent."""
        async with self.healthy() as stream:
            reader, writer = await asyncio.open_connection("127.0.0.1", stream.port)
            offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
            writer.write(request("", offer))
            head = await reader.readuntil(b"\r\n\r\n")
            self.assertTrue(head.startswith(b"HTTP/1.1 101"))
            self.assertNotIn(b"extensions", head.lower())
            writer.write(frame(2, bytes(100), reserved=4))  # a compressed message
            with contextlib.suppress(ConnectionError):
                await reader.read()  # until the server ends it
            await closed(writer)

    def test_bound_to_localhost(self) -> None:
        """S11: by default, the server is not there on any other address."""
        with running("server.py", "--port", "0") as process:
            url = first_line(process)
            self.assertTrue(url.startswith("ws://localhost:"))
            port = int(url.split(":")[2].split("/")[0])
            socket.create_connection(("localhost", port)).close()
            with self.assertRaises(OSError):
                socket.create_connection(("127.0.0.2", port), timeout=1).close()


class ClientBarrageTests(FaultCase):
    """False servers: one line a try, nothing counted, and longer and longer waits."""

    def setUp(self) -> None:
        super().setUp()
        # Tornado logs a traceback for some handshakes that it cannot accept; so client.py does this
        # too.
        logging.getLogger("tornado.application").setLevel(logging.CRITICAL)
        self.addCleanup(logging.getLogger("tornado.application").setLevel, logging.NOTSET)

    async def believe(
        self,
        reply: Reply,
        expected: str,
        tries: int = 6,
        hold: bool = False,
    ) -> WebSocketClient:
        """Let a client meet the false server some times; return the client."""
        waits: list[float] = []

        def at_once(low: float, high: float) -> float:
            waits.append(high)
            return low

        with (
            unittest.mock.patch("random.uniform", at_once),
            self.assertLogs("client", "WARNING") as logs,
        ):
            async with (
                FakeServer(reply, hold=hold) as fake,
                following(client := expectant(fake.url)),
            ):
                await lines(logs, tries)
        self.assertIn(fake.connections - len(logs.output), (0, 1))
        self.assertEqual(waits[:tries], [0.01 * 2**attempt for attempt in range(tries)])
        for line in logs.output:
            self.assertRegex(line, f"^WARNING:client:{expected}; next try in 0.0 s$")
            self.assertNotIn("\n", line)
        return client

    def assert_untouched(self, client: WebSocketClient) -> None:
        """Assert that nothing more has been counted."""
        self.assertEqual(client.posterior, BetaBinomial(3, 2))
        self.assertEqual((client.epoch, client.position, client.missed), ("e", 8, 0))

    @gen_test
    async def test_refused_handshake(self) -> None:
        """W16: a refused handshake costs one line with the reason."""
        for status, expected in {
            "200 OK": "Non-websocket response",
            "301 Moved": "HTTP 301: Moved",
            "403 Forbidden": "HTTP 403: Forbidden",
            "404 Not Found": "HTTP 404: Not Found",
            "500 Oops": "HTTP 500: Oops",
            "503 too many clients": "HTTP 503: too many clients",
        }.items():
            with self.subTest(status):
                head = f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n"
                self.assert_untouched(
                    await self.believe(canned(head), f"cannot connect: {expected}")
                )

    @gen_test
    async def test_false_handshake(self) -> None:
        """W17: garbage and a wrong accept key are tried one at a time."""
        # Tornado leaves a connection unclosed whose 101 it cannot accept, until its timeout.
        self.enterContext(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "Unclosed WebSocketClientConnection", ResourceWarning)
        self.addCleanup(gc.collect)
        false_handshakes: dict[str, Reply] = {
            "garbage": canned("garbage\r\n\r\n"),
            "other garbage": canned("HTTP/1.1 9\r\n\r\n"),
            "nothing": canned(""),
            "a wrong key": lambda key: accept(b"x" * 24),
            "no key": lambda key: accept(key).split(b"Sec-WebSocket-Accept")[0] + b"\r\n",
            "no upgrade": lambda key: accept(key).replace(b"websocket", b"x"),
            "an extension": lambda key: accept(key)[:-2] + b"Sec-WebSocket-Extensions: x\r\n\r\n",
        }
        for name, reply in false_handshakes.items():
            with self.subTest(name):
                self.assert_untouched(await self.believe(reply, f"(cannot connect: .*|{ENDED})"))

    @gen_test
    async def test_messages_that_cannot_be_understood(self) -> None:
        """W18: such a message costs one line, counts nothing, and ends the connection."""
        for name, message in NONSENSE.items():
            with self.subTest(name):
                self.assert_untouched(
                    await self.believe(
                        accept_and_say(message + GOOD), f"(cannot understand .*|{ENDED})", hold=True
                    )
                )

    @gen_test
    async def test_too_large_for_the_client(self) -> None:
        """W22, S9: a message over the client's limit is not read, but refused with 1009."""
        huge = accept_and_say(frame(1, b"x" * 1000, masked=False, length=11 * 2**20))
        self.assert_untouched(await self.believe(huge, ENDED, tries=4, hold=True))
        async with FakeServer(huge, hold=True) as fake, following(Recorder(fake.url)):
            await until(lambda: fake.codes)
        self.assertEqual(fake.codes[0], 1009)

    @gen_test
    async def test_redirect(self) -> None:
        """S9: a redirect is not followed."""
        async with FakeServer(canned("")) as elsewhere:
            for code in (301, 302, 303, 307, 308):
                place = f"Location: http://127.0.0.1:{elsewhere.port}/"
                head = f"HTTP/1.1 {code} There\r\n{place}\r\nContent-Length: 0\r\n\r\n"
                with self.subTest(code):
                    await self.believe(canned(head), f"cannot connect: HTTP {code}: There")
            self.assertEqual(elsewhere.connections, 0)

    @gen_test
    async def test_flood_of_messages(self) -> None:
        """S9: while a client is busy with one message, the flood of others waits in the server."""
        count = 400
        flood = b"".join(
            text(json.dumps({"epoch": "e", "offset": n * 10_000, "samples": [1] * 10_000}))
            for n in range(count)
        )
        async with FakeServer(accept_and_say(flood), hold=True) as fake:
            with busy(fake.url) as client:
                await until(lambda: client.messages)
                sent = -1
                while sent != (sent := fake.sent):
                    await asyncio.sleep(0.3)  # it stands still when the kernel's buffers are full
                self.assertLess(sent, len(flood))
                self.assertEqual(client.messages, 1)
                client.free.set()
                await at(client, count * 10_000)
                self.assertEqual(client.posterior, BetaBinomial(1 + count * 10_000, 1))
                await asyncio.to_thread(client.stop)


def expectant(url: str) -> WebSocketClient:
    """Return a client that has counted something already, and stands at offset 8."""
    client = WebSocketClient(url, retry_delay=0.01)
    client.posterior, client.epoch, client.position = BetaBinomial(3, 2), "e", 8
    return client


GOOD = text('{"epoch": "e", "offset": 8, "samples": [1]}')
NONSENSE = {
    "a list": text("[]"),
    "an empty object": text("{}"),
    "no JSON": text("x"),
    "nothing": text(""),
    "null": text("null"),
    "a number": text("7"),
    "a string": text('"epoch"'),
    "a binary message": frame(2, b'{"epoch": "e", "offset": 8, "samples": [1]}', masked=False),
    "an epoch that is a number": text('{"epoch": 1, "offset": 8, "samples": [1]}'),
    "no epoch": text('{"offset": 8, "samples": [1]}'),
    "no offset": text('{"epoch": "e", "samples": [1]}'),
    "no samples": text('{"epoch": "e", "offset": 8}'),
    "samples that are text": text('{"epoch": "e", "offset": 8, "samples": "101"}'),
    "an offset of -1": text('{"epoch": "e", "offset": -1, "samples": [1]}'),
    "an offset of 1.5": text('{"epoch": "e", "offset": 1.5, "samples": [1]}'),
    "an offset of NaN": text('{"epoch": "e", "offset": NaN, "samples": [1]}'),
    "an offset of true": text('{"epoch": "e", "offset": true, "samples": [1]}'),
    "an offset of 5,000 digits": text(
        '{"epoch": "e", "offset": %s, "samples": [1]}' % ("1" * 5_000)
    ),
    "deep nesting": text("[" * 100_000),
    "half a message": text('{"epoch": "e", "offset": 8, "samp'),
    "invalid UTF-8": text(b'{"epoch": "\xff", "offset": 8, "samples": [1]}'),
    "a reserved opcode": frame(3, b"x", masked=False),
}


class BusyClient(WebSocketClient):
    """A client whose on_message takes its time: until it is set free."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.free = threading.Event()
        self.messages = 0

    def on_message(self, samples: list[Any]) -> None:
        """Wait, then update the posterior."""
        self.messages += 1
        self.free.wait()
        super().on_message(samples)


@contextlib.contextmanager
def busy(url: str) -> Iterator[BusyClient]:
    """Run a busy client in its thread, and set it free in the end."""
    client = BusyClient(url)
    client.start()
    try:
        yield client
    finally:
        client.free.set()
        client.stop()


class HistoryTests(unittest.TestCase):
    """The client's rule, against a count that goes sample by sample."""

    def test_random_histories(self) -> None:
        """W19: 5,000 histories of overlaps, repeats, gaps, restarts and nonsense count exactly."""
        log = logging.getLogger("client")
        level = log.level
        log.setLevel(logging.CRITICAL)
        self.addCleanup(log.setLevel, level)
        rng = random.Random(SEED)

        async def histories() -> None:
            for number in range(5_000):
                with self.subTest(SEED=SEED, history=number):
                    await self.check(random_history(rng), rng)

        asyncio.run(histories())

    async def check(
        self, history: list[tuple[int, int, list[int] | None]], rng: random.Random
    ) -> None:
        """Give a history of epochs, offsets and samples to a client, and count beside it."""
        client = Recorder("ws://localhost")
        client._limit, client._samples = 0.01, []
        seen: list[int] = []
        epoch, position, missed = -1, 0, 0
        for run, offset, samples in history:
            message = json.dumps({"epoch": f"{run:08x}", "offset": offset, "samples": samples})
            if samples is None:
                with self.assertRaises(ConnectionAbortedError):
                    await client._receive(message)
                continue
            await client._receive(message)
            if run != epoch:
                position = offset if epoch < 0 else 0
                epoch = run
            while position < offset:
                missed += 1
                position += 1
            for number, sample in enumerate(samples, offset):
                if number == position:
                    seen.append(sample)
                    position += 1
            if rng.random() < 0.5:  # or what has come waits for further messages
                client._hand_over()
                self.assertEqual(client.samples, seen)
                self.assertEqual((client.position, client.missed), (position, missed))
        client._hand_over()
        self.assertEqual(client.samples, seen)
        self.assertEqual((client.position, client.missed), (position, missed))


def random_history(rng: random.Random) -> list[tuple[int, int, list[int] | None]]:
    """Return messages as epoch, offset and samples; None in place of samples is nonsense."""
    history: list[tuple[int, int, list[int] | None]] = []
    run, end = 0, rng.choice((0, 0, 1000))
    for _ in range(rng.randrange(1, 15)):
        size = rng.choice((0, 1, 1, 2, 5, 30))
        offset = end
        match rng.randrange(8):
            case 0:
                run, offset = run + 1, rng.choice((0, 0, 3, 40))
            case 1:
                offset = max(0, end - rng.randrange(1, 40))  # an overlap, or wholly behind
            case 2:
                offset = end + rng.randrange(1, 40)  # a gap
            case 3 if history:
                history.append(history[-1])
                continue
            case 4:
                history.append((run, offset, None))
                continue
        history.append((run, offset, [run * 1_000_000 + offset + n for n in range(size)]))
        end = offset + size
    return history


class ResourceTests(FaultCase):
    """Crowds, peers that never read, silence, and too little of everything."""

    @gen_test(timeout=120)
    async def test_peers_that_never_read(self) -> None:
        """R1: ten peers that never read a fast stream cost the server no memory."""
        seconds, batch = (30, 200) if LONG else (1.5, 1000)
        growth, _ = await never_reading(self.handler, Recorder, seconds, batch)
        self.assertLess(growth, 5)

    @gen_test
    async def test_large_history(self) -> None:
        """R14: a history of 20 MB comes in messages of message_size samples, all of it."""
        async with serving(self.handler) as stream:
            stream.sample = "{:02000}".format
            stream.send(10_000)
            connection = await websocket_connect(stream.url)
            sizes: list[int] = []
            while sum(sizes) < 10_000:
                message = json.loads(await connection.read_message() or "")
                sizes.append(len(message["samples"]))
            connection.close()
            self.assertEqual(sizes, [1000] * 10)
            async with following(client := Recorder(stream.url)):
                await caught_up(stream, client)
            self.assertEqual((client.samples, client.missed), (stream.samples, 0))

    @gen_test
    async def test_cut_before_the_backlog_is_through(self) -> None:
        """R15: behind 35 kB/s and a cut every 0.9 s, clients get a backlog of 100 kB in the end."""
        async with contextlib.AsyncExitStack() as stack:
            stream = await stack.enter_async_context(self.healthy())
            stream.sample = lambda offset: 10_000_000 + offset
            stream.send(10_000)
            slow = itertools.repeat(Fault("slow", life=0.9, ending="reset"))
            proxies = [Proxy(stream.port, slow, self.rng, 4096) for _ in range(5)]
            for proxy in proxies:
                await stack.enter_async_context(proxy)
            clients = [Recorder(proxy.url) for proxy in proxies]
            async with following(*clients):
                await caught_up(stream, *clients)
                for client, proxy in zip(clients, proxies, strict=True):
                    self.assertGreater(proxy.connections, 1)
                    self.assertEqual((client.samples, client.missed), (stream.samples, 0))

    @gen_test(timeout=300)
    async def test_connections_made_and_dropped(self) -> None:
        """R16: thousands of them cost the server at most 4 MB of memory, and no descriptor."""
        with python("server.py", "--port", "0", "--address", "127.0.0.1") as process:
            port = int(first_line(process).split(":")[2].split("/")[0])
            files = Path(f"/proc/{process.pid}/fd")
            count = len(list(files.iterdir()))

            async def visit() -> None:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(request())
                await reader.readuntil(b"\r\n\r\n")
                linger(writer)
                await closed(writer)

            async def visits(number: int) -> float:
                for _ in range(number // 50):
                    await asyncio.gather(*(visit() for _ in range(50)))
                await until(lambda: len(list(files.iterdir())) == count)
                return memory(process)

            before = await visits(3_000)  # with 50 at once: the most that the heap needs
            self.assertLess(await visits(26_000 if LONG else 3_000), before + 4)

    @gen_test
    async def test_crowd(self) -> None:
        """R3: 500 clients come at once, and all catch up from offset 0."""
        with open_files(4096):
            tally = await crowd(self.handler, Recorder, late=1_000)
        self.assertEqual((tally.lost, tally.doubled, tally.missed), (0, 0, 0))

    @gen_test
    async def test_churn(self) -> None:
        """R3: 300 clients that come and go leave no client, task or open file behind."""
        async with self.healthy() as stream:
            with streaming(stream):
                await streamed(stream, 10)
                tasks, files = len(asyncio.all_tasks()), count_files()
                for _ in range(6):
                    clients = [Recorder(stream.url) for _ in range(50)]
                    async with following(*clients):
                        await until(lambda: all(client.samples for client in clients))  # noqa: B023
                await until(lambda: len(stream.server.clients) == 1)
                await until(lambda: len(asyncio.all_tasks()) <= tasks)
                await until(lambda: count_files() <= files)

    @gen_test
    async def test_too_many_clients(self) -> None:
        """R3: more than max_clients at once get 503 and the reason, and come in when others go."""
        async with self.healthy(max_clients=11) as stream:
            guests = [Recorder(stream.url) for _ in range(10)]
            others = [Recorder(stream.url) for _ in range(10)]
            with self.assertLogs("client", "WARNING") as logs:
                async with following(*others):
                    async with following(*guests):
                        stream.send(10)
                        everyone = (*guests, *others)
                        await until(lambda: sum(bool(client.samples) for client in everyone) >= 10)
                        await lines(logs, 10)
                        self.assertEqual(len(stream.server.clients), 11)
                    await until(lambda: all(client.samples for client in others))
            for line in logs.output:
                self.assertRegex(line, "cannot connect: .*503.*too many clients; next try in")

    @gen_test
    async def test_silent_connections(self) -> None:
        """R6: a connection whose request never comes whole is closed after a while."""
        async with self.healthy(idle=0.3) as stream:
            await asyncio.gather(*(dropped(stream.port, *slow) for slow in slow_requests(0.05)))

    @long_test
    @gen_test(timeout=60)
    async def test_silent_connections_at_full_length(self) -> None:
        """R6: server.py closes them after 10 s."""
        with running("server.py", "--port", "0", "--address", "127.0.0.1") as process:
            port = int(first_line(process).split(":")[2].split("/")[0])
            start = time.monotonic()
            await asyncio.gather(*(dropped(port, *slow) for slow in slow_requests(1)))
            self.report(f"closed after {time.monotonic() - start:.1f} s")

    @gen_test
    async def test_blocked_output_of_the_client(self) -> None:
        """R7: a client whose standard output is blocked goes on listening."""
        pongs: list[bytes] = []
        # Without a timeout, since a late pong is no fault here: only none at all would be.
        settings = {"websocket_ping_interval": 0.05, "websocket_ping_timeout": 0}
        with unread_pipe() as (_, sink):
            fill(sink)
            async with serving(
                self.handler, settings=settings, on_pong=lambda self, data: pongs.append(data)
            ) as stream:
                stream.sample = lambda offset: offset * offset % 3
                with python("client.py", "--url", stream.url, stdout=sink):
                    with streaming(stream):
                        await until(lambda: len(pongs) >= 10)
                    self.assertEqual(len(stream.server.clients), 1)

    @gen_test
    async def test_blocked_output_of_the_server(self) -> None:
        """R7: a server whose standard output is blocked goes on streaming."""
        command = ("server.py", "--port", "0", "--interval", "5")
        with unread_pipe() as (source, sink), python(*command, stdout=sink):
            with os.fdopen(source, closefd=False) as output:
                client = WebSocketClient(output.readline().rstrip("\n"))
            fill(sink)
            async with following(client):
                await at(client, 100)

    @gen_test
    async def test_starved_processor(self) -> None:
        """R9: a starved processor makes the server skip ticks, and nobody misses a sample."""
        with contextlib.ExitStack() as stack:
            process = stack.enter_context(serving_numbers(self.handler))
            client = Recorder(first_line(process))
            for _ in range(1 + (os.cpu_count() or 1)):
                stack.enter_context(python("-c", "while True: pass"))
            async with following(client):
                await at(client, 100)
            self.assertEqual(client.samples, list(range(len(client.samples))))
            self.assertEqual(client.missed, 0)

    @gen_test
    async def test_slow_on_message(self) -> None:
        """R13: a client that is slower than the stream gets larger messages, and all of it."""
        async with self.healthy(buffer=4096, history_size=1_000_000) as stream:
            stream.sample = lambda offset: offset * offset % 3
            with busy(stream.url) as client:
                await until(lambda: len(stream.server.clients) == 2)
                with streaming(stream, batch=2_000):
                    await streamed(stream, 200_000)
                    client.free.set()
                await at(client, stream.end)
                self.assertEqual(client.posterior, BetaBinomial().update(stream.samples))
                self.assertLess(client.messages, 90)  # of 100 or more
                await asyncio.to_thread(client.stop)


@contextlib.contextmanager
def open_files(count: int) -> Iterator[None]:
    """Let this process have so many open files, where the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def count_files() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/dev/fd"))


def slow_requests(pause: float) -> Iterator[tuple[bytes, float]]:
    """Yield how requests begin, and the seconds between the bytes that follow; 0 for none."""
    header = b"GET /websocket HTTP/1.1\r\nHost: localhost\r\nX: "
    body = b"POST /websocket HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    return itertools.product((b"", header, body), (0, pause))


async def dropped(port: int, begin: bytes, pause: float) -> None:
    """Send a byte every so many seconds, or none, until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    end = asyncio.ensure_future(reader.read())
    with contextlib.suppress(ConnectionError):
        writer.write(begin)
        while pause and not end.done():
            writer.write(b"x")
            await asyncio.sleep(pause)
        await end
    await closed(writer)


@contextlib.contextmanager
def unread_pipe() -> Iterator[tuple[int, int]]:
    """Yield the two ends of a pipe that nobody reads."""
    source, sink = os.pipe()
    try:
        yield source, sink
    finally:
        os.close(source)
        os.close(sink)


def fill(sink: int) -> None:
    """Write to a pipe until whoever writes to it next is blocked."""
    os.set_blocking(sink, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(sink, bytes(2**16))
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(sink, bytes(1))
    os.set_blocking(sink, True)


class InputTests(unittest.TestCase):
    """What users and shells can get wrong."""

    def refused(self, main: Callable[[], object], arguments: Sequence[str]) -> None:
        """Run a script's main with each of the arguments: one line, exit code 2, and no start."""
        started = AssertionError("started")
        for argument in arguments:
            with (
                self.subTest(argument),
                unittest.mock.patch("server.httpserver.HTTPServer", side_effect=started),
                unittest.mock.patch("client.WebSocketClient.start", side_effect=started),
                unittest.mock.patch("sys.argv", ["script.py", argument]),
                contextlib.redirect_stderr(io.StringIO()) as errors,
            ):
                try:
                    main()
                except SystemExit as end:
                    self.assertEqual(end.code, 2)
                self.assertRegex(errors.getvalue(), r"^script.py: error: .*\n$")

    def test_urls(self) -> None:
        """I7: a URL that can never work is refused in one line, with exit code 2."""
        web, bare = "http://localhost:8765/websocket", "localhost:8765/websocket"
        ports = [f"ws://localhost:{port}/websocket" for port in ("99999", "0", "-1", "x")]
        urls = (web, bare, "localhost", "", "ws://", "ws://[::1/websocket", "ftp://h/", *ports)
        self.refused(client.main, [f"--url={url}" for url in urls])

    def test_options(self) -> None:
        """I9: an option out of range is refused in one line, with exit code 2."""
        self.refused(
            lambda: asyncio.run(server.main()),
            [
                *(f"--port={port}" for port in ("-1", "abc", "99999", "")),
                *(f"--p={p}" for p in ("-0.1", "1.1", "nan", "inf", "x")),
                *(f"--interval={interval}" for interval in ("0", "-1", "nan", "inf", "0.5")),
                *(f"--batch={batch}" for batch in ("0", "-1", "1e3")),
            ],
        )

    def test_closed_standard_output(self) -> None:
        """I13: a reader that takes one line and goes, as head -1 does, ends the client quietly."""
        with (
            running("server.py", "--port", "0", "--interval", "5") as server,
            running("client.py", "--url", first_line(server)) as client,
        ):
            assert client.stdout
            assert client.stderr
            self.assertIn("Beta(", client.stdout.readline())
            client.stdout.close()
            errors = client.stderr.read()
            self.assertEqual(client.wait(), 0)
            for line in errors.splitlines():
                self.assertIn(" connected to ws://", line)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full here")
    def test_full_standard_output(self) -> None:
        """I14: a full disk costs one line and exit code 1."""
        with (
            running("server.py", "--port", "0") as server,
            open("/dev/full", "w") as full,
            python(
                "client.py", "--url", first_line(server), stdout=full, stderr=subprocess.PIPE
            ) as client,
        ):
            assert client.stderr
            lines = [line for line in client.stderr if " connected to ws://" not in line]
            self.assertEqual(client.wait(), 1)
            self.assertEqual(len(lines), 1, lines)
            self.assertRegex(lines[0], "^standard output: .*No space left")


if __name__ == "__main__":
    unittest.main()
