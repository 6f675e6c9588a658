"""The processes that measure: a contestant's server, its many clients, and what receives.

Each has an event loop and an object, whose coroutines it runs when it is asked to. What is asked,
part by part, and how it is printed, is in benchmark.py.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from client import BetaBinomial
from tests.contestants import CONTESTANTS, Take, receive_ours
from tests.support import HANDSHAKE

TIMEOUT = 300  # seconds until a process that does not answer ends the run
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tornado.httpserver", "tornado.websocket"])  # or each takes a while


class Process(contextlib.AbstractContextManager["Process"]):
    """A second process with an object of this kind, which answers what is asked of it."""

    def __init__(self, kind: type) -> None:
        self.pipe, end = FRESH.Pipe()
        self.process = FRESH.Process(target=obey, args=(end, kind), daemon=True)
        self.process.start()
        end.close()

    def begin(self, question: Callable[..., Any], *arguments: Any) -> None:
        """Ask a coroutine of the object, and do something else before the answer."""
        self.pipe.send((question, arguments))

    def answer(self) -> Any:
        """Wait for the next answer."""
        if not self.pipe.poll(TIMEOUT):
            sys.exit(f"{self.process.name} does not answer")
        return self.pipe.recv()

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """Ask and wait for the answer."""
        self.begin(question, *arguments)
        return self.answer()

    def memory(self, field: str = "VmRSS") -> float:
        """Return the MiB that the process occupies, or has occupied at most: VmHWM."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(status.partition(f"{field}:")[2].split()[0]) / 1024

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def obey(pipe: Connection, kind: type) -> None:
    """Answer one question after the other, until the benchmark has ended, however that was."""

    async def obeying() -> None:
        loop, own = asyncio.get_running_loop(), kind()
        while True:
            question, arguments = await loop.run_in_executor(None, pipe.recv)
            pipe.send(await question(own, *arguments))

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


class Server:
    """The server of a contestant."""

    def __init__(self) -> None:
        self.delivered = asyncio.Event()  # set when all clients have got a 0
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, self.delivered.set)

    async def start(self, name: str, pings: bool, port: int) -> int:
        """Serve, and return the port."""
        serve: Any = CONTESTANTS[name].serve
        port, self.send_samples = await serve(pings, port)
        return port

    async def send(self, samples: list[Any]) -> None:
        """Send to every client, in the way of the contestant."""
        if sending := self.send_samples(samples):
            await sending


class Load:
    """Many clients that read as fast as they can, and count the samples, each 1 or, at last, 0."""

    def __init__(self) -> None:
        self.got = self.zeros = 0
        self.ends: dict[socket.socket, bytes] = {}  # since a sample may come in two parts

    async def connect(self, port: int, clients: int, places: int = 0, server: int = 0) -> None:
        """Become so many clients, who tell the server's process when all of them have got a 0."""
        for _ in range(clients):
            client = socket.create_connection(("127.0.0.1", port))
            client.sendall(HANDSHAKE)
            reply = b""
            while b"\r\n\r\n" not in reply:
                reply += client.recv(4096)
            self.ends[client] = b""
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


@contextlib.contextmanager
def serving(
    name: str, clients: int, pings: bool = False, places: int = 0, port: int = 0
) -> Iterator[tuple[int, Process, Process]]:
    """Start a contestant's server and its clients; yield the port and both processes."""
    with Process(Server) as server, Process(Load) as loading:
        port = server.ask(Server.start, name, pings, port)
        loading.ask(Load.connect, port, clients, places, server.process.pid)
        yield port, server, loading


class Receiver:
    """Clients of a contestant, or of ours if it has none; they may block, so they have a thread."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def follow(self, name: str, port: int, takes: list[Take]) -> None:
        """Start a client for each of what is to take the samples."""
        receive = CONTESTANTS[name].receive or receive_ours

        async def following() -> None:
            url = f"ws://127.0.0.1:{port}/websocket"
            await asyncio.gather(*(receive(url, take) for take in takes))

        threading.Thread(target=asyncio.run, args=[following()], daemon=True).start()

    async def count(self, name: str, port: int, trials: int) -> tuple[float, float]:
        """Update a posterior; return the processor time of so many trials, and when they ended."""
        posterior, start = BetaBinomial(), 0.0
        done = concurrent.futures.Future[tuple[float, float]]()

        def take(samples: list[int]) -> None:
            nonlocal posterior, start
            if samples:  # the first message may tell no more than the position
                start = start or time.process_time()
            posterior = posterior.update(samples)
            if posterior.alpha + posterior.beta - 2 == trials:
                done.set_result((time.process_time() - start, time.perf_counter()))

        self.follow(name, port, [take])
        return await asyncio.wrap_future(done)

    async def watch(self, name: str, port: int, clients: int, pause: float) -> None:
        """Become so many clients, whose on_message takes so long; a sample is when it was sent."""

        def take(number: int, samples: list[float]) -> None:
            now = time.perf_counter()
            self.seen.extend((number, now, sample) for sample in samples)
            time.sleep(pause)

        self.follow(name, port, [functools.partial(take, number) for number in range(clients)])

    async def since(self, begun: float) -> list[tuple[int, float, float]]:
        """Return, for each sample since then: which client, when it came, when it was sent."""
        return [record for record in self.seen[:] if record[1] > begun]
