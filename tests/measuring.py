"""The processes of the benchmark: servers, their load, and receivers, asked through pipes."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import logging
import multiprocessing
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from client import BetaBinomial
from server import RandomBernoulli, WebSocketServer
from tests.support import HANDSHAKE

try:
    import resource
except ImportError:  # Windows
    sys.exit("benchmark.py: needs Linux or macOS")


from tests.contestants import SERVERS, Log, Receiver

TIMEOUT = 120  # seconds until a process that does not answer ends the run
SPAWN = multiprocessing.get_context("spawn")


# Processes: each runs one of these functions, and talks to the benchmark through a pipe.


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
            sys.exit(f"benchmark.py: {self.process.name} does not answer")
        return self.pipe.recv()

    def ask(self, *question: Any) -> Any:
        """Send a question and wait for its answer."""
        self.pipe.send(question)
        return self.answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def prepare() -> int:
    """Quieten this process, allow it many sockets, and return how many."""
    logging.disable(logging.ERROR)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = 100_000 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit


def memory() -> int:
    """Return the bytes of memory that this process occupies."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def serve(pipe: Connection, name: str, delivered: Connection, pings: bool, port: int) -> None:
    """Be the server of one contestant, and the measured process when messages are sent."""
    prepare()
    asyncio.run(serving(pipe, name, delivered, pings, port))


async def serving(
    pipe: Connection, name: str, delivered: Connection, pings: bool, port: int
) -> None:
    loop = asyncio.get_running_loop()
    all_delivered = asyncio.Event()
    coin = RandomBernoulli(0.72)

    def on_delivered() -> None:
        delivered.recv_bytes()
        all_delivered.set()

    async def send(samples: list[Any]) -> None:
        sending = send_samples(samples)
        if sending is not None:
            await sending

    async with SERVERS[name](pings, port) as (actual_port, send_samples):
        loop.add_reader(delivered.fileno(), on_delivered)
        pipe.send(actual_port)
        while True:
            match await loop.run_in_executor(None, pipe.recv):
                case "memory", _:
                    pipe.send(memory())
                case "fan out", (messages, window):
                    start = time.process_time()
                    for _ in range(messages // window):
                        for _ in range(window):
                            await send([1])
                            for _ in range(2):  # turns of the event loop, for what is left to do
                                await asyncio.sleep(0)
                        await all_delivered.wait()
                        all_delivered.clear()
                    pipe.send(time.process_time() - start)
                case "time", (rate, seconds):
                    # Each sample is the time at which it was taken, or 0 until the client is there.
                    WebSocketServer.history.clear()
                    pipe.send(None)  # only now may clients come, or they would get old samples
                    there = loop.run_in_executor(None, pipe.recv)
                    async for _ in ticks(rate, TIMEOUT):
                        await send([0])
                        if there.done():
                            break
                    async for now in ticks(rate, seconds):
                        await send([now])
                    await send([-1])
                    pipe.send(None)
                case "overload", (rate, seconds, limit):
                    before, cpu, sent = memory(), time.process_time(), 0
                    total, start = int(rate * seconds), time.perf_counter()
                    while sent < total and time.perf_counter() < start + limit:
                        if sent < (time.perf_counter() - start) * rate:
                            sent += 1
                            await send([2 if sent == total else 1])
                        else:
                            await asyncio.sleep(0.001)
                    late = float("inf")
                    with contextlib.suppress(TimeoutError):
                        left = start + limit - time.perf_counter()
                        await asyncio.wait_for(all_delivered.wait(), max(0, left))
                        late = time.perf_counter() - start - seconds
                    unit = 1 if sys.platform == "darwin" else 1024
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
                    pipe.send((late, (time.process_time() - cpu) / max(1, sent), peak - before))
                case "run", (rate,):
                    async for _ in ticks(rate, TIMEOUT):
                        await send([os.getpid()])
                case "flood", (size, seconds):
                    WebSocketServer.history_size = size // 3  # samples of three characters each
                    before = memory()
                    async for _ in ticks(100, seconds):
                        await send([1] * (size // 3))
                    pipe.send(memory() - before)
                case "sample", (batch, batches):
                    WebSocketServer.history.clear()
                    pipe.send(None)  # only now may the client come, or it would get old samples
                    while not WebSocketServer.clients:
                        await asyncio.sleep(0.001)
                    (client,) = WebSocketServer.clients
                    start = time.perf_counter()
                    for _ in range(batches):
                        await send([coin.sample() for _ in range(batch)])
                        while client.writing:
                            await asyncio.sleep(0)
                    while WebSocketServer.clients:
                        await asyncio.sleep(0.001)
                    pipe.send(start)


async def ticks(rate: float, seconds: float) -> AsyncIterator[float]:
    """Yield the time, so often per second, leaving out the ticks that it is late for."""
    due = start = time.perf_counter()
    while due < start + seconds:
        await asyncio.sleep(max(0, due - time.perf_counter()))
        now = time.perf_counter()
        yield now
        due += max(1, (now - due) * rate // 1) / rate


def load(
    pipe: Connection,
    delivered: Connection | None,
    port: int,
    clients: int,
    greeted: bool,
    places: int = 0,
) -> None:
    """Be many clients that read as fast as they can, and say when all have read a message.

    So many places are freed again, evenly among the clients, for those who connect later: objects
    that are made one after the other would be served one after the other, all early or all late.
    """
    prepare()
    selector = selectors.DefaultSelector()
    leaving = []
    for number in range(clients):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(HANDSHAKE)
        _, _, rest = read_until(client, lambda data: b"\r\n\r\n" in data).partition(b"\r\n\r\n")
        if greeted:
            read_until(client, lambda data: len(data) >= 2 and len(data) >= 2 + data[1], rest)
        client.setblocking(False)
        if places and number % (clients // places) == 0:
            leaving.append(client)
        else:
            selector.register(client, selectors.EVENT_READ)
    for client in leaving:
        client.close()
    selector.register(pipe.fileno(), selectors.EVENT_READ)
    pipe.send(None)
    received, expected = 0, sys.maxsize
    finished, tails = 0, dict[int, bytes]()
    while True:
        for key, _ in selector.select():
            if isinstance(key.fileobj, socket.socket):
                data = key.fileobj.recv(1 << 16)
                received += len(data)
                if expected == 0:  # wait for the sample 2, the last one, in each client
                    tail = tails[key.fd] = (tails.get(key.fd, b"") + data)[-3:]
                    finished += tail == b"2]}"
                if not data:
                    selector.unregister(key.fileobj)
            else:
                (expected,) = pipe.recv()
                received = 0
                pipe.send(None)
        if delivered and expected == 0 and finished == clients:
            finished = 0
            delivered.send_bytes(b"x")
        while delivered and expected and received >= expected:
            received -= expected
            delivered.send_bytes(b"x")


def read_until(client: socket.socket, enough: Callable[[bytes], bool], data: bytes = b"") -> bytes:
    """Read until there is enough data."""
    while not enough(data):
        data += client.recv(4096)
    return data


def blast(pipe: Connection) -> None:
    """Be a server that sends as many numbered messages as a client asks for in its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    pipe.send(listener.getsockname()[1])
    while True:
        client, _ = listener.accept()
        with client:
            request = read_until(client, lambda data: b"\r\n\r\n" in data).decode()
            headers = dict(line.split(": ", 1) for line in request.split("\r\n")[1:] if line)
            key = {name.lower(): value for name, value in headers.items()}["sec-websocket-key"]
            digest = hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()
            reply = (
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}\r\n\r\n"
            )
            log = Log()
            frames = [reply.encode()]
            number, batch = map(int, request.split()[1].partition("?")[0].split("/")[1:])
            for _ in range(number):
                message = log.message([1] * batch).encode()
                size = len(message)
                head = [size] if size < 126 else [126, *size.to_bytes(2)]
                frames.append(bytes([0x81, *head]) + message)
            with contextlib.suppress(OSError):
                client.sendall(b"".join(frames[:2]))
                time.sleep(0.2)  # the first message starts the clock, so it must come alone
                del frames[:2]
                client.sendall(b"".join(frames))
                client.sendall(struct.pack("!BBH", 0x88, 2, 1000))
                client.settimeout(10)
                client.recv(4096)  # its Close frame: the server closes first (RFC 6455, 7.1.1)


def receive(pipe: Connection, receiver: Receiver) -> None:
    """Be one client, and the measured process; or many clients that come back."""
    prepare()
    while True:
        match pipe.recv():
            case "count", (url, messages, batch):
                pipe.send(count(receiver, url, messages, batch))
            case "slow", (url, seconds):
                slow(pipe, receiver, url, seconds)
            case "follow", (url, trials):
                pipe.send(follow(receiver, url, trials))
            case "delays", (url, clients):
                pipe.send(delays(pipe, receiver, url, clients))
            case "return", (url, clients):
                asyncio.run(returning(pipe, receiver, url, clients))


def slow(pipe: Connection, receiver: Receiver, url: str, seconds: float) -> None:
    """Tell how old the samples are that a consumer of 20 ms is handed at the end, and exit.

    Without a goodbye: whoever is behind would first read all that has come meanwhile.
    """
    begun, age = 0.0, 0.0

    def take(samples: list[float]) -> bool:
        nonlocal begun, age
        now = time.perf_counter()
        if times := [sample for sample in samples if sample > 0]:
            begun, age = begun or now, now - times[0]
        if samples[-1] < 0 or (begun and now > begun + 0.95 * seconds):
            pipe.send(age)
            os._exit(0)
        time.sleep(0.02)
        return False

    asyncio.run(receiver(url, take))


def trials_of(posterior: BetaBinomial) -> int:
    return int(posterior.alpha + posterior.beta - 2)


def count(receiver: Receiver, url: str, messages: int, batch: int) -> float:
    """Return the processor time for all messages but the first, which starts the clock."""
    posterior, start, end = BetaBinomial(), 0.0, 0.0

    def take(samples: list[int]) -> bool:
        nonlocal posterior, start, end
        if not trials_of(posterior):
            start = time.process_time()
        posterior = posterior.update(samples)
        if trials_of(posterior) == messages * batch:
            end = time.process_time()
        return trials_of(posterior) == messages * batch

    asyncio.run(receiver(url, take))
    return (end - start) / (messages - 1)


def follow(receiver: Receiver, url: str, trials: int) -> float:
    """Return when the posterior has had so many trials."""
    posterior, end = BetaBinomial(), 0.0

    def take(samples: list[int]) -> bool:
        nonlocal posterior, end
        posterior, end = posterior.update(samples), time.perf_counter()
        return trials_of(posterior) >= trials

    asyncio.run(receiver(url, take))
    return end


def delays(pipe: Connection, receiver: Receiver, url: str, clients: int) -> list[float]:
    """Say when all clients are there; return the ages of the samples, which are their times."""
    ages: list[float] = []
    there: set[int] = set()

    def take(number: int, samples: list[float]) -> bool:
        now = time.perf_counter()
        ages.extend(now - sample for sample in samples if sample > 0)
        if number not in there:
            there.add(number)
            if len(there) == clients:
                pipe.send(None)
        return samples[-1] < 0

    async def receive_all() -> None:
        takes = [functools.partial(take, number) for number in range(clients)]
        await asyncio.gather(*(receiver(url, take) for take in takes))

    asyncio.run(receive_all())
    return ages


async def returning(pipe: Connection, receiver: Receiver, url: str, clients: int) -> None:
    """Tell when all clients are there, and after a restart, when each of them had come back."""
    runs: dict[int, int] = {}
    times: dict[int, float] = {}

    def take(number: int, samples: list[int]) -> bool:
        if samples[-1] != runs.get(number):
            runs[number], times[number] = samples[-1], time.perf_counter()
        return False

    tasks = [
        asyncio.ensure_future(receiver(url, functools.partial(take, number)))
        for number in range(clients)
    ]
    for _ in "first run", "second run":
        while len(times) < clients:
            await asyncio.sleep(0.01)
        pipe.send(sorted(times.values()))
        times.clear()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
