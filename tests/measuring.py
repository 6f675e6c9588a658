"""The processes that measure: a contestant's server, its many clients, and what receives.

What is asked of them, part by part, and how it is printed, is in benchmark.py.
"""

import asyncio
import contextlib
import functools
import logging
import multiprocessing
import resource
import selectors
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self

from client import BetaBinomial
from tests.contestants import CONTESTANTS, receive_ours
from tests.support import HANDSHAKE

TIMEOUT = 300  # seconds until a process that does not answer ends the run
SPAWN = multiprocessing.get_context("spawn")


class Process:
    """A second process that runs a function, which answers what is sent to it."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        self.pipe, end = SPAWN.Pipe()
        self.process = SPAWN.Process(target=function, args=(end, *arguments), daemon=True)
        self.process.start()
        end.close()

    def answer(self) -> Any:
        """Wait for the next answer."""
        if not self.pipe.poll(TIMEOUT):
            sys.exit(f"{self.process.name} does not answer")
        return self.pipe.recv()

    def ask(self, *question: Any) -> Any:
        """Send a question and wait for its answer."""
        self.pipe.send(question)
        return self.answer()

    def memory(self) -> float:
        """Return the MiB that the process occupies."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * resource.getpagesize() / 2**20

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


async def ticks(rate: float, seconds: float) -> AsyncIterator[float]:
    """Yield the time, so often per second, leaving out the ticks that it is late for."""
    due = start = time.perf_counter()
    while due < start + seconds:
        await asyncio.sleep(max(0, due - time.perf_counter()))
        now = time.perf_counter()
        yield now
        due += max(1, (now - due) * rate // 1) / rate


# Sending: the server of a contestant, and all its clients in one other process.


class Server(NamedTuple):
    """What a function that is asked of a server's process gets to work with."""

    pipe: Connection
    send: Callable[[list[Any]], Any]  # to be awaited
    delivered: asyncio.Event  # set when all clients have got a 2


def serve(pipe: Connection, name: str, delivered: Connection, pings: bool, port: int) -> None:
    """Be the server of a contestant; await each function that is asked, and answer its result."""

    async def serving() -> None:
        loop = asyncio.get_running_loop()
        start: Any = CONTESTANTS[name].serve
        actual_port, send_samples = await start(pings, port)

        async def send(samples: list[Any]) -> None:
            sending = send_samples(samples)
            if sending is not None:
                await sending

        def on_delivered() -> None:
            delivered.recv_bytes()
            server.delivered.set()

        server = Server(pipe, send, asyncio.Event())
        loop.add_reader(delivered.fileno(), on_delivered)
        pipe.send(actual_port)
        while True:
            function, *arguments = await loop.run_in_executor(None, pipe.recv)
            pipe.send(await function(server, *arguments))

    logging.disable(logging.ERROR)
    asyncio.run(serving())


def load(pipe: Connection, delivered: Connection, port: int, clients: int, places: int) -> None:
    """Be many clients that read as fast as they can, and count the samples, each 1 or, at last, 2.

    A question is how many twos are to come until the server is told, again and again; its answer is
    how many samples came since the last question. So many places are freed again, evenly among the
    clients, for those who connect later: servers go round in about the order of connecting.
    """
    selector = selectors.DefaultSelector()
    leaving = []
    for number in range(clients):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(HANDSHAKE)
        reply = b""
        while b"\r\n\r\n" not in reply:
            reply += client.recv(4096)
        if places and number % (clients // places) == 0:
            leaving.append(client)
        else:
            selector.register(client, selectors.EVENT_READ)
    for client in leaving:
        client.close()
    selector.register(pipe, selectors.EVENT_READ)
    pipe.send(None)
    got, twos, step = 0, 0, sys.maxsize
    ends: dict[int, bytes] = {}  # of what came last, since a sample may come in two parts
    while True:
        for key, _ in selector.select():
            if isinstance(key.fileobj, socket.socket):
                new = key.fileobj.recv(1 << 16)
                data = ends.get(key.fd, b"") + new
                last = data.count(b" [2") + data.count(b", 2")
                got, twos = got + last + data.count(b" [1") + data.count(b", 1"), twos + last
                ends[key.fd] = data[-2:]
                if not new:
                    selector.unregister(key.fileobj)
            else:
                (step,) = pipe.recv()
                pipe.send(got)
                got = twos = 0
        while twos >= step:
            twos -= step
            delivered.send_bytes(b"x")


@contextlib.contextmanager
def serving(
    name: str, clients: int, pings: bool = False, places: int = 0, port: int = 0
) -> Iterator[tuple[int, Process, Any]]:
    """Start a contestant's server and its clients, if any; yield the port and both processes."""
    here, there = SPAWN.Pipe()
    with contextlib.ExitStack() as stack:
        server, loading = stack.enter_context(Process(serve, name, here, pings, port)), None
        port = server.answer()
        if clients:
            loading = stack.enter_context(Process(load, there, port, clients, places))
            loading.answer()
        yield port, server, loading


# Receiving: a contestant's client, or several of them in one process.


async def follow(name: str, port: int, take: Callable[[list[Any]], None]) -> None:
    """Be a client that is a contestant's, or ours if it has none."""
    logging.disable(logging.ERROR)
    receive = CONTESTANTS[name].receive or receive_ours
    await receive(f"ws://127.0.0.1:{port}/websocket", take)


def count(pipe: Connection, name: str, port: int, trials: int) -> None:
    """Update a posterior; after so many trials, tell the processor time that they took, and now."""
    posterior, start = BetaBinomial(), 0.0

    def take(samples: list[int]) -> None:
        nonlocal posterior, start
        if samples:  # the first message may tell no more than the position
            start = start or time.process_time()
        posterior = posterior.update(samples)
        if posterior.alpha + posterior.beta - 2 == trials:
            pipe.send((time.process_time() - start, time.perf_counter()))

    threading.Thread(target=asyncio.run, args=[follow(name, port, take)], daemon=True).start()
    pipe.poll(None)  # until the benchmark has ended, however that was


def watch(pipe: Connection, name: str, port: int, clients: int, pause: float) -> None:
    """Be so many clients, whose on_message takes so long; a sample is the time it was sent at.

    Answer, for each sample that has come since then: which client, when it came, the sample.
    """
    seen: list[tuple[int, float, float]] = []

    def take(number: int, samples: list[float]) -> None:
        now = time.perf_counter()
        seen.extend((number, now, sample) for sample in samples)
        time.sleep(pause)

    async def watching() -> None:
        takes = [functools.partial(take, number) for number in range(clients)]
        await asyncio.gather(*(follow(name, port, take) for take in takes))

    threading.Thread(target=asyncio.run, args=[watching()], daemon=True).start()
    while True:
        (since,) = pipe.recv()
        pipe.send([record for record in seen[:] if record[1] > since])
