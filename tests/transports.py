"""Move the same samples from one Tornado process to another by five transports, and compare.

How many clients a server can feed, and what other libraries cost, is in benchmark.py.
"""

import argparse
import asyncio
import contextlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from tornado.http1connection import HTTP1Connection
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream
from tornado.tcpclient import TCPClient
from tornado.tcpserver import TCPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler
from tornado.websocket import WebSocketHandler, websocket_connect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.benchmark import progress, table, versions
from tests.measuring import Process, ticks

Take = Callable[[str | bytes], int]  # takes a message and returns the position after it


RATE = 100  # samples per second, each in a message of its own
samples: list[float] = []  # so far, each the time at which it was taken
grown = asyncio.Event()


async def until_beyond(offset: int) -> None:
    while len(samples) == offset:
        grown.clear()
        await grown.wait()


def encode(offset: int) -> str:
    return json.dumps({"epoch": "9f86d081", "offset": offset, "samples": samples[offset:]})


async def messages() -> AsyncIterator[str]:
    offset = 0
    while True:
        await until_beyond(offset)
        message, offset = encode(offset), len(samples)
        yield message


# The transports: a server and a client each, as short as they can be, none of them reconnecting.


class WebSocketSide(WebSocketHandler):
    def open(self) -> None:
        self.set_nodelay(True)
        self.task = asyncio.ensure_future(self.push())

    async def push(self) -> None:
        async for message in messages():
            await self.write_message(message)

    def on_close(self) -> None:
        self.task.cancel()


async def follow_websocket(port: int, take: Take) -> None:
    connection = await websocket_connect(f"ws://127.0.0.1:{port}/")
    while message := await connection.read_message():
        take(message)


class EventsSide(RequestHandler):
    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        cast(HTTP1Connection, self.request.connection).stream.set_nodelay(True)
        async for message in messages():
            self.write(f"data: {message}\n\n")
            await self.flush()


async def follow_events(port: int, take: Take) -> None:
    rest = b""

    def on_chunk(chunk: bytes) -> None:
        nonlocal rest
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            take(event.removeprefix(b"data: "))

    url = f"http://127.0.0.1:{port}/"
    await AsyncHTTPClient().fetch(HTTPRequest(url, streaming_callback=on_chunk, request_timeout=0))


class PollSide(RequestHandler):
    def get(self) -> None:
        self.finish(encode(int(self.get_query_argument("offset"))))


async def follow_poll(port: int, take: Take) -> None:
    position = 0
    async for _ in ticks(RATE, float("inf")):
        url = f"http://127.0.0.1:{port}/?offset={position}"
        position = take((await AsyncHTTPClient().fetch(url)).body)


class LongPollSide(RequestHandler):
    async def get(self) -> None:
        offset = int(self.get_query_argument("offset"))
        await until_beyond(offset)
        self.finish(encode(offset))


async def follow_long_poll(port: int, take: Take) -> None:
    position = 0
    while True:
        url = f"http://127.0.0.1:{port}/?offset={position}"
        position = take((await AsyncHTTPClient().fetch(url)).body)


class TCPSide(TCPServer):
    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        stream.set_nodelay(True)
        async for message in messages():
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


def serve(pipe: Connection, name: str, seconds: float) -> None:
    """Be the process that the samples come from; tell its port, then what a sample has taken."""
    sizes: list[int] = []  # of what the streams have moved, in both directions
    for method in IOStream.read_from_fd, IOStream.write_to_fd:

        def counted(stream: IOStream, data: Any, method: Any = method) -> int | None:
            sizes.append(method(stream, data) or 0)
            return sizes[-1] or None

        setattr(IOStream, method.__name__, counted)

    async def serving() -> None:
        listener, port = bind_unused_port()
        side = TRANSPORTS[name][0]
        server = TCPSide() if side is TCPSide else HTTPServer(Application([("/", side)]))
        server.add_socket(listener)
        pipe.send(port)
        samples.append(0)  # the client takes it and says that it is there
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        sizes.clear()
        start = time.process_time()
        async for now in ticks(RATE, seconds):
            samples.append(now)
            grown.set()
        await asyncio.sleep(0.1)  # the last sample travels
        number, spent = len(samples) - 1, time.process_time() - start
        pipe.send((number, sum(sizes) / number, spent / number * 1e6))
        await asyncio.Event().wait()

    asyncio.run(serving())


def consume(pipe: Connection, name: str, port: int) -> None:
    """Be the process that the samples go to; tell its processor time and the delays."""
    position, start, delays = 0, 0.0, list[float]()

    def take(message: str | bytes) -> int:
        nonlocal position, start
        now, new = time.perf_counter(), json.loads(message)["samples"]
        if position == 0 and new:
            start = time.process_time()
            pipe.send(None)
        delays.extend((now - sample) * 1e3 for sample in new if sample)
        position += len(new)
        return position

    async def consuming() -> None:
        following = asyncio.ensure_future(TRANSPORTS[name][1](port, take))
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        pipe.send((time.process_time() - start, sorted(delays)))
        await following

    asyncio.run(consuming())


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="that all take turns in: 5")
    parser.add_argument("--seconds", type=float, default=3, help="of each: 3")
    options = parser.parse_args()
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in TRANSPORTS}
    for turn in range(options.rounds):
        for name, results in found.items():
            progress(f"round {turn + 1}, {name}")
            with contextlib.ExitStack() as stack:
                server = stack.enter_context(Process(serve, name, options.seconds))
                client = stack.enter_context(Process(consume, name, server.answer()))
                client.answer()
                number, size, sending = server.ask("begin")
                receiving, delays = client.ask("end")
            late = statistics.median(delays), delays[int(len(delays) * 0.99)]
            results.append((size, sending, receiving / number * 1e6, *late))
    progress("")
    print(f"{versions()}. One sample in a message, {RATE} messages/s.\n")
    heading = ["per sample", "bytes", "us, server", "us, client", "ms delay, median"]
    rows = [[*heading, "99th percentile", "lines"]]
    for name, results in found.items():
        middles = [statistics.median(column) for column in zip(*results, strict=True)]
        lines = sum(len(inspect.getsource(side).splitlines()) for side in TRANSPORTS[name])
        rows.append([name, *map("{:,.{}f}".format, middles, [0, 0, 0, 1, 1]), str(lines)])
    table(*rows)


if __name__ == "__main__":
    main()
