"""Move the same samples from one Tornado process to another by five transports, and compare.

How many clients a server can feed, and what other libraries cost, is in benchmark.py.
"""

import argparse
import asyncio
import inspect
import json
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
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

from tests.benchmark import Part, Row, table, take_turns, versions
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


class Source:
    """The process that the samples come from."""

    def __init__(self) -> None:
        self.sizes: list[int] = []  # of what the streams have moved, in both directions
        for method in IOStream.read_from_fd, IOStream.write_to_fd:

            def counted(stream: IOStream, data: Any, method: Any = method) -> int | None:
                self.sizes.append(method(stream, data) or 0)
                return self.sizes[-1] or None

            setattr(IOStream, method.__name__, counted)

    async def serve(self, name: str) -> int:
        """Serve by a transport, and return the port."""
        listener, port = bind_unused_port()
        side = TRANSPORTS[name][0]
        server = TCPSide() if side is TCPSide else HTTPServer(Application([("/", side)]))
        server.add_socket(listener)
        samples.append(0)  # the client takes it, and is there
        return port

    async def feed(self, seconds: float) -> tuple[int, float, float]:
        """Add samples; return how many, and the bytes and the processor time of each, in us."""
        self.sizes.clear()
        start = time.process_time()
        async for now in ticks(RATE, seconds):
            samples.append(now)
            grown.set()
        await asyncio.sleep(0.1)  # the last sample travels
        number, spent = len(samples) - 1, time.process_time() - start
        return number, sum(self.sizes) / number, spent / number * 1e6


class Sink:
    """The process that the samples go to."""

    def __init__(self) -> None:
        self.position, self.delays, self.there = 0, list[float](), asyncio.Event()

    def take(self, message: str | bytes) -> int:
        now, new = time.perf_counter(), json.loads(message)["samples"]
        self.delays += [(now - sample) * 1e3 for sample in new]
        self.position += len(new)
        self.there.set()
        return self.position

    async def follow(self, name: str, port: int) -> None:
        """Connect, and wait for the first sample, which does not count."""
        self.following = asyncio.ensure_future(TRANSPORTS[name][1](port, self.take))
        await self.there.wait()
        self.delays.clear()
        self.start = time.process_time()

    async def spent(self) -> tuple[float, list[float]]:
        """Return the processor time, and the delays."""
        return time.process_time() - self.start, sorted(self.delays)


def transport(name: str, seconds: float) -> Part:
    """Move samples by a transport."""
    while True:
        with Process(Source) as server, Process(Sink) as client:
            client.ask(Sink.follow, name, server.ask(Source.serve, name))
            number, size, sending = server.ask(Source.feed, seconds)
            receiving, delays = client.ask(Sink.spent)
        yield {
            Row("bytes", 0): size,
            Row("us, server", 0): sending,
            Row("us, client", 0): receiving / number * 1e6,
            Row("ms delay, median"): statistics.median(delays),
            Row("99th percentile"): delays[int(len(delays) * 0.99)],
        }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="%(default)s")
    parser.add_argument("--seconds", type=float, default=3, help="of each: 3")
    options = parser.parse_args()
    found = take_turns(transport, TRANSPORTS, (options.seconds,), options.rounds)
    print(f"{versions()}. One sample in a message, {RATE} messages/s.\n")
    rows = [["per sample", *(row.label for row in found), "lines"]]
    for name, sides in TRANSPORTS.items():
        lines = sum(len(inspect.getsource(side).splitlines()) for side in sides)
        rows.append([name, *(row.cell(name, found[row]) for row in found), str(lines)])
    table(*rows)


if __name__ == "__main__":
    main()
