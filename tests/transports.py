"""Move the same samples from one Tornado process to another by five transports, and compare."""

import argparse
import asyncio
import contextlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from tornado.http1connection import HTTP1Connection
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.netutil import bind_sockets
from tornado.tcpclient import TCPClient
from tornado.tcpserver import TCPServer
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler, websocket_connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.benchmark import progress, table, versions
from tests.measuring import Process, prepare, ticks

Take = Callable[[str | bytes], int]  # takes a message and returns the position after it


class Log:
    """The samples so far, each the time at which it was taken."""

    def __init__(self) -> None:
        self.samples: list[float] = []
        self.grown = asyncio.Event()

    def append(self, sample: float) -> None:
        """Append a sample and wake all that wait for one."""
        self.samples.append(sample)
        self.grown.set()
        self.grown = asyncio.Event()

    def message(self, offset: int) -> str:
        """Encode the samples from this offset on."""
        return json.dumps({"epoch": "9f86d081", "offset": offset, "samples": self.samples[offset:]})

    async def messages(self) -> AsyncIterator[str]:
        """Yield one message after the other."""
        offset = 0
        while True:
            while offset == len(self.samples):
                await self.grown.wait()
            message, offset = self.message(offset), len(self.samples)
            yield message


log = Log()


# The transports: a server and a client each, as short as they can be, none of them reconnecting.


class WebSocketSide(WebSocketHandler):
    def open(self) -> None:
        self.set_nodelay(True)
        self.task = asyncio.ensure_future(self.push())

    async def push(self) -> None:
        async for message in log.messages():
            await self.write_message(message)

    def on_close(self) -> None:
        self.task.cancel()


async def follow_websocket(port: int, take: Take) -> None:
    connection = await websocket_connect(f"ws://127.0.0.1:{port}/websocket")
    while message := await connection.read_message():
        take(message)


class EventsSide(RequestHandler):
    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        cast(HTTP1Connection, self.request.connection).stream.set_nodelay(True)
        async for message in log.messages():
            self.write(f"data: {message}\n\n")
            await self.flush()


async def follow_events(port: int, take: Take) -> None:
    rest = b""

    def on_chunk(chunk: bytes) -> None:
        nonlocal rest
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            take(event.removeprefix(b"data: "))

    url = f"http://127.0.0.1:{port}/events"
    await AsyncHTTPClient().fetch(HTTPRequest(url, streaming_callback=on_chunk, request_timeout=0))


class PollSide(RequestHandler):
    def get(self) -> None:
        self.finish(log.message(int(self.get_query_argument("offset"))))


async def follow_poll(port: int, take: Take, rate: float) -> None:
    position = 0
    async for _ in ticks(rate, float("inf")):
        url = f"http://127.0.0.1:{port}/poll?offset={position}"
        position = take((await AsyncHTTPClient().fetch(url)).body)


class LongPollSide(RequestHandler):
    async def get(self) -> None:
        offset = int(self.get_query_argument("offset"))
        while offset == len(log.samples):
            await log.grown.wait()
        self.finish(log.message(offset))


async def follow_long_poll(port: int, take: Take) -> None:
    position = 0
    while True:
        url = f"http://127.0.0.1:{port}/long-poll?offset={position}"
        position = take((await AsyncHTTPClient().fetch(url)).body)


class TCPSide(TCPServer):
    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        stream.set_nodelay(True)
        async for message in log.messages():
            await stream.write(message.encode() + b"\n")


async def follow_tcp(port: int, take: Take) -> None:
    stream = await TCPClient().connect("127.0.0.1", port)
    while True:
        take(await stream.read_until(b"\n"))


TRANSPORTS: dict[str, tuple[type, Callable[..., Coroutine[Any, Any, None]]]] = {
    "WebSocket": (WebSocketSide, follow_websocket),
    "Server-Sent Events": (EventsSide, follow_events),
    "HTTP polling": (PollSide, follow_poll),
    "HTTP long polling": (LongPollSide, follow_long_poll),
    "plain TCP": (TCPSide, follow_tcp),
}


def serve(pipe: Connection, rate: float, seconds: float) -> None:
    """Be the process that the samples come from; tell its ports, and its processor time."""

    async def serving() -> None:
        (web,) = bind_sockets(0, "127.0.0.1")
        application = Application(
            [
                ("/websocket", WebSocketSide),
                ("/events", EventsSide),
                ("/poll", PollSide),
                ("/long-poll", LongPollSide),
            ]
        )
        HTTPServer(application).add_socket(web)
        (plain,) = bind_sockets(0, "127.0.0.1")
        TCPSide().add_socket(plain)
        pipe.send((web.getsockname()[1], plain.getsockname()[1]))
        log.append(0)  # the client takes it and says that it is there
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, pipe.recv)
        start = time.process_time()
        async for now in ticks(rate, seconds):
            log.append(now)
        await asyncio.sleep(0.1)  # the last sample travels
        pipe.send((time.process_time() - start, len(log.samples) - 1))
        await loop.run_in_executor(None, pipe.recv)

    prepare()
    asyncio.run(serving())


def consume(pipe: Connection, name: str, port: int, rate: float) -> None:
    """Be the process that the samples go to; tell its processor time and the delays."""

    async def consuming() -> None:
        position, start = 0, 0.0
        delays: list[float] = []

        def take(message: str | bytes) -> int:
            nonlocal position, start
            now = time.perf_counter()
            samples = json.loads(message)["samples"]
            if position == 0 and samples:
                start = time.process_time()
                pipe.send(None)
            delays.extend(now - sample for sample in samples if sample)
            position += len(samples)
            return position

        follow = TRANSPORTS[name][1]
        task = asyncio.ensure_future(
            follow(port, take, rate) if name == "HTTP polling" else follow(port, take)
        )
        (wanted,) = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        while len(delays) < wanted:
            await asyncio.sleep(0.01)
        pipe.send((time.process_time() - start, delays))
        task.cancel()

    prepare()
    asyncio.run(consuming())


def forward(pipe: Connection, port: int) -> None:
    """Be a proxy in front of this port, and count the bytes in both directions."""
    count = 0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        while data := await reader.read(1 << 16):
            count += len(data)
            writer.write(data)
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        further_reader, further_writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.suppress(OSError):
            await asyncio.gather(pump(reader, further_writer), pump(further_reader, writer))

    async def forwarding() -> None:
        proxy = await asyncio.start_server(accept, "127.0.0.1", 0)
        pipe.send(proxy.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        pipe.send(count)

    prepare()
    asyncio.run(forwarding())


def run(name: str, rate: float, seconds: float, counted: bool) -> tuple[float, ...]:
    """Move samples once: return bytes, both processor times, and median and tail of the delay."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Process(serve, rate, seconds))
        web, plain = server.answer()
        port = plain if name == "plain TCP" else web
        if counted:
            proxy = stack.enter_context(Process(forward, port))
            port = proxy.answer()
        client = stack.enter_context(Process(consume, name, port, rate))
        client.answer()
        sending, samples = server.ask("begin")
        receiving, delays = client.ask(samples)
        size = proxy.ask("end") if counted else 0
    delays.sort()
    return (
        size / samples,
        sending / samples * 1e6,
        receiving / samples * 1e6,
        statistics.median(delays) * 1e3,
        delays[int(len(delays) * 0.99)] * 1e3,
    )


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    option = partial(parser.add_argument, help="default: %(default)s")
    option("--rounds", type=int, default=5)
    option("--rate", type=float, default=100, metavar="SAMPLES_PER_SECOND")
    option("--seconds", type=float, default=3)
    options = parser.parse_args()
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in TRANSPORTS}
    sizes = {}
    for turn in range(options.rounds + 1):  # the first one counts the bytes
        for name in TRANSPORTS:
            progress(f"round {turn}, {name}")
            result = run(name, options.rate, options.seconds, counted=turn == 0)
            if turn:
                results[name].append(result)
            else:
                sizes[name] = result[0]
    progress("")
    print(f"{versions()}. One sample in a message, {options.rate:g} messages/s.\n")
    rows = []
    for name, sides in TRANSPORTS.items():
        _, *middles = (statistics.median(column) for column in zip(*results[name], strict=True))
        lines = sum(len(inspect.getsource(side).splitlines()) for side in sides)
        rows.append([name, f"{sizes[name]:.0f}", *(f"{m:.0f}" for m in middles[:2])])
        rows[-1] += [*(f"{m:.1f}" for m in middles[2:]), str(lines)]
    table(
        [
            "per sample",
            "bytes",
            "us, server",
            "us, client",
            "ms delay, median",
            "99th percentile",
            "lines",
        ],
        *rows,
    )


if __name__ == "__main__":
    main()
