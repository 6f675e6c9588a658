"""The processes that measure: a contestant's server, its many clients, and what receives.

Each has an event loop and an object, of which it runs the methods that it is asked for. What is
asked, part by part, is in benchmark.py.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from client import BetaBinomial
from server import RandomBernoulli, WebSocketServer
from tests.measurements import contestants
from tests.measurements.contestants import Contestant, Take, encode, receive_ours
from tests.recipes.fast_lane import frame
from tests.support import HANDSHAKE, until

LONGEST = 300  # seconds; if a process does not answer for so long, the program ends
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tests.measurements.measuring"])  # or each takes a while to start


class Process(contextlib.AbstractContextManager["Process"]):
    """A second process with an object of this kind, which answers what is asked of it."""

    def __init__(self, kind: type) -> None:
        self.pipe, end = FRESH.Pipe()
        self.process = FRESH.Process(target=obey, args=(end, kind), daemon=True)
        self.process.start()
        self.pid = self.process.pid or 0
        end.close()

    def begin(self, method: Callable[..., Any], *arguments: Any) -> None:
        """Ask for a method, and do something else before the answer."""
        self.pipe.send((method, arguments))

    def answer(self) -> Any:
        """Wait for the next answer."""
        if not self.pipe.poll(LONGEST):
            sys.exit(f"{self.process.name} does not answer")
        return self.pipe.recv()

    def ask(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Ask and wait for the answer."""
        self.begin(method, *arguments)
        return self.answer()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def obey(pipe: Connection, kind: type) -> None:
    """Answer one question after the other, until the program has ended, however that was."""

    async def obeying() -> None:
        loop, own = asyncio.get_running_loop(), kind()
        while True:
            method, arguments = await loop.run_in_executor(None, pipe.recv)
            pipe.send(await method(own, *arguments))

    logging.disable(logging.ERROR)
    with contextlib.suppress(EOFError):
        asyncio.run(obeying())


async def ticks(rate: float, seconds: float) -> AsyncIterator[float]:
    """Yield the time, so often per second, leaving out the ticks that it is late for."""
    due = start = time.perf_counter()
    while due < start + seconds:
        now = time.perf_counter()
        yield now
        due += max(1, (now - due) * rate // 1) / rate
        await asyncio.sleep(max(0, due - time.perf_counter()))


async def spent(own: object) -> float:
    """Return the processor time that this process has used."""
    return time.process_time()


class Server:
    """The server of a contestant, and the sources that feed it."""

    def __init__(self) -> None:
        self.delivered = asyncio.Event()  # set when all clients have got a 0
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.delivered.set)

    async def start(self, who: Contestant, pings: bool, port: int) -> int:
        """Serve, and return the port."""
        assert who.serve
        port, self.send_samples = await who.serve(pings, port)
        return port

    async def send(self, samples: list[Any]) -> None:
        """Send to every client, in the way of the contestant."""
        if sending := self.send_samples(samples):
            await sending

    async def send_times(self, rate: float, seconds: float, more: int = 0) -> None:
        """Send the time, so often per second, and so many more samples in the same message."""
        async for now in ticks(rate, seconds):
            await self.send([now] + [1] * more)

    async def deliver(self, samples: list[Any], messages: int) -> float:
        """Send messages, each when all have the one before; return the processor time of each."""
        start = time.process_time()
        for _ in range(messages):
            self.delivered.clear()
            await self.send(samples)
            await self.delivered.wait()
        return (time.process_time() - start) / messages

    async def pour(self, rate: int, seconds: float, limit: float) -> tuple[float, float]:
        """Send each sample by a call of its own; return how late the last arrived, and the cost."""
        cpu, begun, sent, late = time.process_time(), time.perf_counter(), 0, math.inf
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds + limit):
                while sent < rate * seconds:
                    due = int(min(time.perf_counter() - begun, seconds) * rate)
                    for _ in range(min(due - sent, max(1, rate // 100))):  # so that the loop turns
                        sent += 1
                        await self.send([int(sent < rate * seconds)])
                    await asyncio.sleep(0.001)
                await self.delivered.wait()
                late = time.perf_counter() - begun - seconds
        return late, time.process_time() - cpu

    async def call(self, calls: int, in_thread: bool) -> float:
        """Call send_message of ours until all is in the log; return the processor time of each."""

        def calling() -> None:
            for _ in range(calls):
                WebSocketServer.send_message([1])

        start, end = time.process_time(), WebSocketServer.stream.end + calls
        await asyncio.to_thread(calling) if in_thread else calling()
        await until(lambda: WebSocketServer.stream.end == end)
        return (time.process_time() - start) / calls

    async def blast(self, batch: int, messages: int) -> None:
        """Send messages as fast as the client of plain Tornado takes them, the first one alone."""
        await until(lambda: contestants.clients)
        stream = next(iter(contestants.clients)).ws_connection.stream
        first, *rest = (frame(encode([1] * batch).encode()) for _ in range(messages))
        stream.write(first)
        await asyncio.sleep(0.2)
        stream.write(b"".join(rest))
        await until(lambda: not contestants.clients)

    async def toss(self, batch: int, messages: int) -> float:
        """Toss, and send to the client of ours; return when it began."""
        coin, stream = RandomBernoulli(0.72), WebSocketServer.stream
        await until(lambda: WebSocketServer.clients)
        client = next(iter(WebSocketServer.clients))
        start = time.perf_counter()
        for _ in range(messages):
            await self.send([coin.sample() for _ in range(batch)])
            await asyncio.sleep(0)
            while client.position < stream.end:  # each goes into a message of its own
                await asyncio.sleep(0)
        await until(lambda: not WebSocketServer.clients)
        stream.history.clear()  # the next client is to get nothing of this round
        return start


def connected(port: int) -> socket.socket:
    """Return a bare socket that the server has taken as a client."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(HANDSHAKE)
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += client.recv(4096)
    return client


class Load:
    """Many clients that read as fast as they can, and count the samples, each 1 or, at last, 0."""

    def __init__(self) -> None:
        self.got = 0
        self.zeros = 0  # since the server's process was told
        self.ends: dict[socket.socket, bytes] = {}  # since a sample may come in two parts

    async def connect(self, port: int, server: int, clients: int, places: int = 0) -> None:
        """Become so many clients, who tell the server's process when all of them have got a 0."""
        self.ends |= {connected(port): b"" for _ in range(clients)}
        # For those who connect later, since servers go round in about the order of connecting.
        for client in [*self.ends][:: clients // places] if places else []:
            del self.ends[client]
            client.close()
        for client in self.ends:
            asyncio.get_running_loop().add_reader(client, self.read, client, server)

    def read(self, client: socket.socket, server: int) -> None:
        """Take what has come to one client."""
        new = client.recv(1 << 16)
        data = self.ends[client] + new
        zeros = data.count(b" [0") + data.count(b", 0")
        self.got += zeros + data.count(b" [1") + data.count(b", 1")
        self.zeros += zeros
        self.ends[client] = data[-2:]
        if not new:
            asyncio.get_running_loop().remove_reader(client)
        if self.zeros >= len(self.ends):
            self.zeros -= len(self.ends)
            os.kill(server, signal.SIGUSR1)

    async def taken(self) -> int:
        """Return how many samples all clients together have got."""
        return self.got

    async def come_and_go(self, port: int, clients: int, seconds: float) -> None:
        """Connect so many clients per second; each leaves a second after it has come."""
        with contextlib.ExitStack() as staying:
            async for _ in ticks(clients, seconds):
                client = staying.enter_context(connected(port))
                asyncio.get_running_loop().call_later(1, client.close)


class Receiver:
    """Clients of a contestant, or of ours if it has none; they may block, so they have a thread."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def follow(self, who: Contestant, port: int, takes: list[Take]) -> None:
        """Start a client for each of what is to take the samples."""
        receive = who.receive or receive_ours

        async def following() -> None:
            url = f"ws://127.0.0.1:{port}/websocket"
            await asyncio.gather(*(receive(url, take) for take in takes))

        threading.Thread(target=asyncio.run, args=[following()], daemon=True).start()

    async def count(self, who: Contestant, port: int, trials: int) -> tuple[float, float, float]:
        """Count trials; return their processor time, when it began to connect, and when it ended."""
        begun, start, posterior = time.perf_counter(), 0.0, BetaBinomial()
        done = concurrent.futures.Future[tuple[float, float, float]]()

        def take(samples: list[int]) -> None:
            nonlocal start, posterior
            if samples:  # the first message may tell no more than the position
                start = start or time.process_time()
            posterior = posterior.update(samples)
            if posterior.alpha + posterior.beta - 2 == trials:
                done.set_result((time.process_time() - start, begun, time.perf_counter()))

        self.follow(who, port, [take])
        return await asyncio.wrap_future(done)

    async def watch(self, who: Contestant, port: int, clients: int, pause: float = 0) -> None:
        """Become so many clients, whose on_message takes so long; a sample is when it was sent."""

        def take(number: int, samples: list[float]) -> None:
            now = time.perf_counter()
            self.seen.extend((number, now, sample) for sample in samples)
            time.sleep(pause)

        self.follow(who, port, [functools.partial(take, number) for number in range(clients)])

    async def since(self, begun: float) -> list[tuple[int, float, float]]:
        """Return, for each sample since then: which client, when it came, when it was sent."""
        return [record for record in self.seen[:] if record[1] > begun]


@contextlib.contextmanager
def started(
    who: Contestant, clients: int, pings: bool = False, places: int = 0, port: int = 0
) -> Iterator[tuple[int, Process, Process]]:
    """Start a contestant's server and its clients; yield the port and both processes."""
    with Process(Server) as server, Process(Load) as loading:
        port = server.ask(Server.start, who, pings, port)
        loading.ask(Load.connect, port, server.pid, clients, places)
        yield port, server, loading
