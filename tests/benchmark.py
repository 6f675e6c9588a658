"""Measure what a sample costs, side by side with the libraries that one would take instead.

Contestants take turns, round by round, and the load comes from processes of its own. Each table
shows the median of the rounds and, in brackets, the median of the ratios to ours in the same round.
"""

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import secrets
import selectors
import socket
import statistics
import struct
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application
from tornado.websocket import WebSocketHandler, websocket_connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from client import BetaBinomial, WebSocketClient
from server import RandomBernoulli, WebSocketServer, make_app
from tests.support import HANDSHAKE, readme_blocks

try:
    import resource
except ImportError:  # Windows
    sys.exit("benchmark.py: needs Linux or macOS")

TIMEOUT = 120  # seconds until a process that does not answer ends the run
FIRST = 100_000  # the first offset: all messages of one sample are equally long
SPAWN = multiprocessing.get_context("spawn")

Send = Callable[[list[Any]], Awaitable[None] | None]
Serving = AbstractAsyncContextManager[tuple[int, Send]]
Take = Callable[[list[Any]], bool]
Receiver = Callable[[str, Take], Coroutine[Any, Any, None]]
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


TINY = Sizes(1, (60,), 200, 100, (1, 100), 1_000, (100,), (1, 5), 0.3, 20, 0.5, 3)


# Serving: each contestant yields its port, and a function that sends samples to every client.


class Log:
    """The same numbered messages as ours, for the contestants that have no log of their own."""

    def __init__(self) -> None:
        self.epoch = secrets.token_hex(4)
        self.end = FIRST

    def message(self, samples: list[Any]) -> str:
        """Encode the samples, and count them."""
        offset, self.end = self.end, self.end + len(samples)
        return json.dumps({"epoch": self.epoch, "offset": offset, "samples": samples})


def tornado_port(application: Application, pings: bool, port: int) -> int:
    """Serve an application and return its port."""
    if not pings:
        application.settings["websocket_ping_interval"] = 0
    sockets = bind_sockets(port, "127.0.0.1", family=socket.AF_INET)
    HTTPServer(application).add_sockets(sockets)
    return int(sockets[0].getsockname()[1])


@asynccontextmanager
async def ours(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    gc.set_threshold(50_000)  # as server.py's main does
    WebSocketServer.end, WebSocketServer.max_clients = FIRST, 100_000
    yield tornado_port(make_app(), pings, port), WebSocketServer.send_message


@asynccontextmanager
async def usual_collector(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    usual = gc.get_threshold()
    async with ours(pings, port) as serving:
        gc.set_threshold(*usual)
        yield serving


@asynccontextmanager
async def fast_lane(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    names: dict[str, Any] = {}
    exec(readme_blocks("The fast lane", "python")[0], names)  # noqa: S102 - our own README
    server: type[WebSocketServer] = names["FastLane"]
    gc.set_threshold(50_000)  # as server.py's main does
    server.end, server.max_clients = FIRST, 100_000
    yield tornado_port(make_app(server), pings, port), server.send_message


@asynccontextmanager
async def plain_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    clients: set[WebSocketHandler] = set()
    log = Log()

    class Handler(WebSocketHandler):
        def open(self) -> None:
            self.set_nodelay(True)
            clients.add(self)

        def on_close(self) -> None:
            clients.discard(self)

    def send(samples: list[Any]) -> None:
        message = log.message(samples)
        for client in clients:
            client.write_message(message)

    yield (
        tornado_port(
            Application([("/websocket", Handler)], websocket_ping_interval=10), pings, port
        ),
        send,
    )


@asynccontextmanager
async def websockets_broadcast(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    clients: set[ServerConnection] = set()
    log = Log()

    async def handler(websocket: ServerConnection) -> None:
        clients.add(websocket)
        try:
            await websocket.wait_closed()
        finally:
            clients.remove(websocket)

    async with serve(handler, "127.0.0.1", port, ping_interval=20 if pings else None) as server:
        yield (
            next(iter(server.sockets)).getsockname()[1],
            lambda samples: broadcast(clients, log.message(samples)),
        )


@asynccontextmanager
async def aiohttp_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    from aiohttp import web

    clients: set[web.WebSocketResponse] = set()
    log = Log()

    async def handler(request: web.Request) -> web.WebSocketResponse:
        websocket = web.WebSocketResponse(heartbeat=10 if pings else None)
        await websocket.prepare(request)
        clients.add(websocket)
        try:
            async for _ in websocket:
                pass
        finally:
            clients.discard(websocket)
        return websocket

    async def send(samples: list[Any]) -> None:
        message = log.message(samples)
        for websocket in clients:
            await websocket.send_str(message)

    application = web.Application()
    application.add_routes([web.get("/websocket", handler)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    yield runner.addresses[0][1], send


@asynccontextmanager
async def picows_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    from picows import WSListener, WSMsgType, WSTransport, ws_create_server

    clients: set[WSTransport] = set()
    log = Log()

    class Listener(WSListener):
        def on_ws_connected(self, transport: WSTransport) -> None:
            clients.add(transport)

        def on_ws_disconnected(self, transport: WSTransport) -> None:
            clients.discard(transport)

    def send(samples: list[Any]) -> None:
        message = log.message(samples).encode()
        for transport in clients:
            transport.send(WSMsgType.TEXT, message)

    server = await ws_create_server(
        lambda request: Listener(), "127.0.0.1", port, enable_auto_ping=pings
    )
    yield server.sockets[0].getsockname()[1], send


@asynccontextmanager
async def starlette_loop(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    clients: list[WebSocket] = []
    log = Log()

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        clients.append(websocket)
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            clients.remove(websocket)

    async def send(samples: list[Any]) -> None:
        message = log.message(samples)
        for websocket in clients:
            await websocket.send_text(message)

    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[WebSocketRoute("/websocket", endpoint)]),
            port=port,
            log_level="critical",
            ws_ping_interval=20 if pings else None,
        )
    )
    task = asyncio.ensure_future(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1], send
    task.cancel()


@asynccontextmanager
async def floor(pings: bool, port: int) -> AsyncIterator[tuple[int, Send]]:
    clients: list[socket.socket] = []
    log = Log()
    loop = asyncio.get_running_loop()
    listener = socket.create_server(("127.0.0.1", port))
    listener.setblocking(False)

    async def accept() -> None:
        while True:
            client, _ = await loop.sock_accept(listener)
            await loop.sock_recv(client, 4096)
            await loop.sock_sendall(client, b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
            clients.append(client)

    def send(samples: list[Any]) -> None:
        message = log.message(samples).encode()
        frame = bytes([0x81, len(message)]) + message
        for client in clients:
            client.send(frame)

    task = asyncio.ensure_future(accept())
    yield listener.getsockname()[1], send
    task.cancel()


SERVERS: dict[str, Callable[[bool, int], Serving]] = {
    "ours": ours,
    "ours, usual garbage collector": usual_collector,
    "ours, fast lane": fast_lane,
    "Tornado, plain loop": plain_loop,
    "websockets, broadcast": websockets_broadcast,
    "aiohttp": aiohttp_loop,
    "picows": picows_loop,
    "starlette, uvicorn": starlette_loop,
    "floor: socket.send": floor,
}


# Receiving: each contestant connects and hands the samples to `take`, until that returns True.


async def receive_ours(url: str, take: Take) -> None:
    class Client(WebSocketClient):
        def on_message(self, samples: list[int]) -> None:
            if take(samples):
                task.cancel()

    task = asyncio.ensure_future(Client(url).run())
    await asyncio.wait([task])


async def receive_tornado(url: str, take: Take) -> None:
    connection = await websocket_connect(url)
    while message := await connection.read_message():
        if take(json.loads(message)["samples"]):
            connection.close()


async def receive_websockets(url: str, take: Take) -> None:
    from websockets.asyncio.client import connect

    async with connect(url) as websocket:
        async for message in websocket:
            if take(json.loads(message)["samples"]):
                break


async def receive_websocket_client(url: str, take: Take) -> None:
    import websocket

    def on_message(app: Any, message: str) -> None:
        if take(json.loads(message)["samples"]):
            app.close()

    websocket.WebSocketApp(url, on_message=on_message).run_forever()


async def receive_aiohttp(url: str, take: Take) -> None:
    import aiohttp

    async with aiohttp.ClientSession() as session, session.ws_connect(url) as websocket:
        async for message in websocket:
            if take(json.loads(message.data)["samples"]):
                break


async def receive_picows(url: str, take: Take) -> None:
    from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect

    class Listener(WSListener):
        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type != WSMsgType.TEXT:
                return
            if take(json.loads(frame.get_payload_as_utf8_text())["samples"]):
                transport.disconnect()

    transport, _ = await ws_connect(Listener, url)
    await transport.wait_disconnected()


RECEIVERS: dict[str, Receiver] = {
    "ours": receive_ours,
    "Tornado, read_message": receive_tornado,
    "websockets": receive_websockets,
    "websocket-client": receive_websocket_client,
    "aiohttp": receive_aiohttp,
    "picows": receive_picows,
}
FLOODED = "ours", "ours, fast lane", "Tornado, plain loop", "websockets, broadcast"
PEERS = {  # the package that a contestant needs
    "websockets, broadcast": "websockets",
    "websockets, async for": "websockets",
    "websockets": "websockets",
    "websocket-client": "websocket-client",
    "aiohttp": "aiohttp",
    "picows": "picows",
    "starlette, uvicorn": "uvicorn",
}


async def return_websockets(url: str, take: Take) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import ConnectionClosed

    async for websocket in connect(url):
        try:
            async for message in websocket:
                take(json.loads(message)["samples"])
        except ConnectionClosed:
            continue


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
    while True:
        for key, _ in selector.select():
            if isinstance(key.fileobj, socket.socket):
                data = key.fileobj.recv(1 << 16)
                received += len(data)
                if not data:
                    selector.unregister(key.fileobj)
            else:
                (expected,) = pipe.recv()
                received = 0
                pipe.send(None)
        while delivered and received >= expected:
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
            for _ in range(int(request.split()[1].removeprefix("/"))):
                message = log.message([1]).encode()
                frames.append(bytes([0x81, len(message)]) + message)
            with contextlib.suppress(OSError):
                client.sendall(b"".join(frames))
                client.sendall(struct.pack("!BBH", 0x88, 2, 1000))
                client.settimeout(10)
                client.recv(4096)  # its Close frame: the server closes first (RFC 6455, 7.1.1)


def receive(pipe: Connection, receiver: Receiver) -> None:
    """Be one client, and the measured process; or many clients that come back."""
    prepare()
    while True:
        match pipe.recv():
            case "count", (url, messages):
                pipe.send(count(receiver, url, messages))
            case "follow", (url, trials):
                pipe.send(follow(receiver, url, trials))
            case "delays", (url, clients):
                pipe.send(delays(pipe, receiver, url, clients))
            case "return", (url, clients):
                asyncio.run(returning(pipe, receiver, url, clients))


def count(receiver: Receiver, url: str, messages: int) -> float:
    """Return the processor time for all messages but the first, which starts the clock."""
    posterior, start, end = BetaBinomial(), 0.0, 0.0

    def take(samples: list[int]) -> bool:
        nonlocal posterior, start, end
        if not posterior.trials:
            start = time.process_time()
        posterior = posterior.update(samples)
        if posterior.trials == messages:
            end = time.process_time()
        return posterior.trials == messages

    asyncio.run(receiver(url, take))
    return (end - start) / (messages - 1)


def follow(receiver: Receiver, url: str, trials: int) -> float:
    """Return when the posterior has had so many trials."""
    posterior, end = BetaBinomial(), 0.0

    def take(samples: list[int]) -> bool:
        nonlocal posterior, end
        posterior, end = posterior.update(samples), time.perf_counter()
        return posterior.trials >= trials

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
        if name == "ours, fast lane":
            readme_blocks("The fast lane", "python")
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    except KeyError:
        return "README.md does not have it"
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


def receiving(sizes: Sizes) -> None:
    """Print the microseconds of processor time per message that is received and counted."""
    names = present(RECEIVERS)
    times: dict[str, list[float]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        url = f"ws://127.0.0.1:{stack.enter_context(Process(blast)).answer()}/{sizes.messages}"
        clients = {name: stack.enter_context(Process(receive, RECEIVERS[name])) for name in names}
        for turn in range(sizes.rounds + 1):
            for name in names:
                progress(f"receiving: round {turn}, {name}")
                seconds = clients[name].ask("count", (url, sizes.messages))
                if turn:
                    times[name].append(seconds * 1e6)
    table(
        ["", "us per received message"],
        *([name, cells(times[name], times["ours"])] for name in names),
    )


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
    "fan-out": fan_out,
    "receiving": receiving,
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
