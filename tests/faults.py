"""A proxy that misbehaves, a server that lies, hostile bytes, and the plain loop to compare with.

What must come of each fault stands in test_faults.py. `python -m tests.faults` prints the table
of tests/README.md.
"""

import asyncio
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import secrets
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tornado.ioloop import PeriodicCallback
from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpserver import TCPServer
from tornado.testing import bind_unused_port
from tornado.websocket import WebSocketClosedError, WebSocketProtocol13, websocket_connect

import server
from client import WebSocketClient
from server import WebSocketServer, make_app
from tests.support import HANDSHAKE, TIMEOUT, Recorder, first_line, fresh_server, running, until

SEED = int(os.environ.get("SEED") or secrets.randbelow(1_000_000))
LONG = os.environ.get("LONG_TESTS") == "1"


class PlainServer(WebSocketServer):
    """The plain pattern: write to one client after the other, and keep nothing."""

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        cls.end += len(samples)
        message = json.dumps(samples)
        with contextlib.suppress(WebSocketClosedError):  # a PeriodicCallback would log it
            for client in cls.clients:
                client.write_message(message)

    def catch_up(self) -> None:
        pass

    def on_message(self, message: str | bytes) -> None:
        pass


class PlainClient(Recorder):
    """The plain pattern: read until the connection ends, wait, connect again."""

    async def run(self) -> None:
        while True:
            with contextlib.suppress(Exception):  # the plain pattern, as it is found
                connection = await websocket_connect(self.url)
                with contextlib.closing(connection):
                    self.epoch, self.position = "unknown", sys.maxsize
                    while (message := await connection.read_message()) is not None:
                        self.samples += json.loads(message)
            await asyncio.sleep(0.005)


Pattern = tuple[type[WebSocketServer], type[Recorder]]
PAIR: Pattern = WebSocketServer, Recorder
PLAIN_LOOP: Pattern = PlainServer, PlainClient


@dataclasses.dataclass
class Stream:
    """A server in this process, where it listens, and a healthy client of it."""

    server: type[WebSocketServer]
    url: str
    control: Recorder

    @property
    def end(self) -> int:
        return self.server.end

    def more(self, count: int) -> list[Recorder]:
        """Make so many clients like the healthy one."""
        return [type(self.control)(self.url) for _ in range(count)]

    def send(self, count: int = 1) -> None:
        """Send so many samples, each of which is its own offset."""
        self.server.send_message([*range(self.end, self.end + count)])

    async def flow(self, condition: Callable[[], object]) -> None:
        """Send ten samples every 10 ms until the condition holds, however slow the machine is."""
        while not condition():
            self.send(10)
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def serving(
    pattern: Pattern = PAIR, address: str = "127.0.0.1", **attributes: Any
) -> AsyncIterator[Stream]:
    """Serve a fresh stream in this event loop, as server.py does, to a healthy client."""
    handler, client_type = pattern
    fresh = fresh_server(handler, clients=WebSocketServer.clients, **attributes)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        task = asyncio.ensure_future(server.serve(make_app(fresh), 0, address))
        await until(output.getvalue)
    stream = Stream(fresh, output.getvalue().strip(), client_type(output.getvalue().strip()))
    try:
        async with following(stream.control):
            await until(lambda: stream.control.epoch)
            yield stream
    finally:
        task.cancel()
        await asyncio.wait([task])


@contextlib.asynccontextmanager
async def following(*clients: WebSocketClient) -> AsyncIterator[None]:
    """Run the clients in this event loop."""
    tasks = [asyncio.ensure_future(client.run()) for client in clients]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def quiet(*clients: Recorder) -> None:
    """Wait until nothing more comes."""
    sizes: list[int] = []
    while sizes != (sizes := [len(client.samples) for client in clients]):
        await asyncio.sleep(0.3)


async def caught_up(stream: Stream, *clients: Recorder) -> None:
    """Wait until the clients stand at the end, and nothing more comes, such as a sample again."""
    await until(lambda: all(client.position >= stream.end for client in clients))
    await quiet(*clients)


@contextlib.asynccontextmanager
async def raw(url: str, data: bytes) -> AsyncIterator[IOStream]:
    """Connect to a server and say something; at the end, reset the connection."""
    stream = IOStream(socket.socket())
    try:
        # Small buffers and segments, or the kernel takes in some MB for a peer that does not read.
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        await stream.connect(("127.0.0.1", urlsplit(url).port))
        stream.write(data)
        yield stream
    finally:
        reset(stream)


def reset(stream: IOStream) -> None:
    """Close a connection with a reset."""
    if not stream.closed():
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()


def frame(
    first: int, payload: bytes = b"", masked: bool = True, length: int | None = None
) -> bytes:
    """Make a frame, which may lie about everything; `length` is what it announces.

    `first` is its first byte: 0x80 if no fragment follows, 0x70 for what is reserved, the opcode.
    """
    size = len(payload) if length is None else length
    short, width = (size, 0) if size < 126 else (126, 2) if size < 2**16 else (127, 8)
    head = bytes([first, masked << 7 | short]) + (size.to_bytes(width) if width else b"")
    key = bytes(4) if masked else b""  # a mask of zeros, which changes nothing
    return head + key + payload


async def close_reason(stream: IOStream) -> str:
    """Read frames up to a Close frame, and return its code and its reason."""
    opcode = 0
    while opcode != 8:
        first, second = await stream.read_bytes(2)
        opcode, size = first & 15, second & 127
        if size > 125:
            size = int.from_bytes(await stream.read_bytes(2 if size == 126 else 8))
        key = await stream.read_bytes(4) if second & 128 else bytes(4)
        payload = await stream.read_bytes(size)
        payload = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    code = int.from_bytes(payload[:2]) if payload else "no code"
    return f"{code} {payload[2:].decode()}".strip()


class Peer(TCPServer):
    """Something that listens on a port of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.streams: list[IOStream] = []  # one for each connection that there has been
        listener, port = bind_unused_port()
        self.add_socket(listener)
        self.url = f"ws://127.0.0.1:{port}/websocket"

    def close(self) -> None:
        """End all connections, and so whatever reads from them or writes to them."""
        self.stop()
        for stream in self.streams:
            stream.close()

    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        self.streams.append(stream)
        with contextlib.suppress(StreamClosedError):
            await self.serve(stream)
        stream.close()

    async def serve(self, stream: IOStream) -> None:
        """Do to a connection what is to be done to it."""


class Fault(NamedTuple):
    """How the proxy treats one connection, from the server to the client."""

    piece: int = 2**16  # bytes that pass at once, at most
    pause: float = 0  # seconds before each piece, with jitter
    life: float = math.inf  # seconds from the first byte to the ending; below 0, none passes
    ending: str = "close"  # or reset, cut, stall
    size: int = 2**62  # bytes until the ending


WHOLE, SLICES, TRICKLE, LATE = Fault(), Fault(16), Fault(512, pause=0.02), Fault(pause=0.05)


def random_fault() -> Fault:
    """Return a fault of any kind and ending, for a connection that lives 0.3 s on average."""
    fault = random.choice((WHOLE, WHOLE, WHOLE, TRICKLE, SLICES, LATE))
    ending = random.choice(("close", "reset", "cut", "stall"))
    return fault._replace(life=random.uniform(-0.03, 0.6), ending=ending)


class Proxy(Peer):
    """A TCP proxy to a server of this machine; connections suffer the fault, or random ones."""

    def __init__(self, url: str, fault: Fault | None) -> None:
        super().__init__()
        self.target = urlsplit(url).port
        self.fault = fault

    async def serve(self, stream: IOStream) -> None:
        """Pass bytes on in both directions, until either side or the fault ends it."""
        upstream = IOStream(socket.socket())
        # Small, or the kernel takes from the server what the client does not take.
        upstream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await upstream.connect(("127.0.0.1", self.target))
        there = self.pass_on(stream, upstream, Fault())
        await asyncio.gather(there, self.pass_on(upstream, stream, self.fault or random_fault()))

    async def pass_on(self, source: IOStream, sink: IOStream, fault: Fault) -> None:
        """Pass bytes on in one direction, then close both ends."""
        now = asyncio.get_running_loop().time
        start, passed = 0.0, 0
        try:
            while True:
                size = min(fault.piece, fault.size - passed)
                data = await source.read_bytes(size, partial=True)
                start = start or now()
                passed += len(data)
                if now() - start > fault.life or passed == fault.size:
                    break
                await asyncio.sleep(random.uniform(0.8, 1.2) * fault.pause)
                await sink.write(data)
            if fault.ending == "cut":
                await sink.write(data[: random.randrange(len(data))])
            if fault.ending == "stall":
                await asyncio.sleep(random.uniform(0.2, 0.8))
            if fault.ending in ("reset", "stall"):
                reset(sink)
        finally:
            source.close()
            sink.close()


class FakeServer(Peer):
    """Answers each handshake with the next of the replies, where KEY stands for what accepts it."""

    def __init__(self, replies: Iterator[bytes], *, hold: bool) -> None:
        super().__init__()
        self.replies = replies
        self.hold = hold  # stay silent then, and do not close before the client does
        self.goodbyes: list[str] = []  # codes and reasons with which clients have closed

    async def serve(self, stream: IOStream) -> None:
        """Say what is in the reply, then read until the client says goodbye or is gone."""
        head = (await stream.read_until(b"\r\n\r\n")).decode()
        (key,) = re.findall("(?im)^sec-websocket-key: (.*)\r$", head)
        accepted = WebSocketProtocol13.compute_accept_value(key).encode()
        await stream.write(next(self.replies).replace(b"KEY", accepted))
        if self.hold:
            self.goodbyes.append(await close_reason(stream))


ACCEPTED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: KEY\r\n\r\n"
)


def text(payload: bytes) -> bytes:
    """Make the frame of a text message of a server."""
    return frame(0x81, payload, masked=False)


def request(*more: str, line: str = "GET /websocket HTTP/1.1", without: str = "nothing") -> bytes:
    """Make a handshake with further header lines, or without one of the usual ones."""
    usual = HANDSHAKE.decode().strip().split("\r\n")[1:]
    kept = [field for field in usual if not field.startswith(without)]
    return "\r\n".join([line, *kept, *more, "", ""]).encode()


BYE = frame(0x88, b"\x03\xe8")  # 1000
ENDS = r"\d+.*|no code|dropped"
PLAIN = b"GET /websocket HTTP/1.1\r\nHost: localhost\r\n\r\n"
POST = "POST /websocket HTTP/1.1"
TWO_LENGTHS = request("Transfer-Encoding: chunked", "Content-Length: 4", line=POST)
DEFLATE = request("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
NOT_UTF_8 = (b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xe2\x82")  # overlong, surrogate, half
CODES = (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535)  # which nobody may send
ORIGINS = ("http://evil.example", "null", "http://localhost:1")
ELSEWHERE = ("/elsewhere", "/", "/websocket/x")
SIZES = (100, 100_000)

# A regular expression for what comes of it, and what follows a handshake, one after the other.
FRAMES: list[tuple[str, list[bytes]]] = [
    ("1008 .*", [frame(0x81, b"1") * 2, frame(0x01, b"a") + frame(0x80, b"b")]),
    ("1009.*|dropped", [frame(0x81, bytes(100_000)), frame(1, b"x") + frame(0, b"x") * 9999]),
    ("1009.*|dropped", [frame(0x82, length=2**63), frame(0x81, length=2**64 - 1)]),
    ("dropped", [frame(0x81, payload) for payload in NOT_UTF_8]),
    ("dropped", [frame(0x81 | bits, b"x") for bits in (0x10, 0x20, 0x40, 0x70)]),
    ("dropped", [frame(0x80 | n, b"x") for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)]),
    ("dropped", [frame(0x89, bytes(126)), frame(0x89, bytes(2**16))]),
    ("dropped", [frame(0x88, b"\x03\xe8" + bytes(124)), frame(0x08), frame(1) + frame(0x81)]),
    ("dropped", [frame(0x09, b"x"), frame(0x0A, b"x"), frame(0x80, b"x"), frame(0, b"x")]),
    (ENDS, [frame(0x88, b"\x03"), frame(0x88, b"\x03\xe8\xff")]),
    (ENDS, [frame(0x88, code.to_bytes(2)) for code in CODES]),
    (ENDS, [BYE + BYE, BYE + frame(0x81, b"x"), frame(0x8A, b"x") + BYE, request()]),
    (ENDS, [frame(0x81, b"x", masked=False), frame(0x89, b"x", masked=False) + BYE]),
    ("1000.*", [frame(0x89, bytes(100)) * 20_000 + BYE]),
]
# The same, and what comes in place of a handshake.
REQUESTS: list[tuple[str, list[bytes]]] = [
    ("400 .*", [PLAIN, request(without="Sec-WebSocket-Key"), request(without="Upgrade")]),
    ("400 .*|dropped", [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"]),  # TLS
    ("404 .*", [request(line=f"GET {path} HTTP/1.1") for path in ELSEWHERE]),
    ("405 .*", [request("Content-Length: 0", line=POST)]),
    ("405 .*", [request(line="WATCH /websocket HTTP/1.1")]),
    ("426 .*", [request("Sec-WebSocket-Version: 8", without="Sec-WebSocket-Version")]),
    ("403 .*", [request(f"Origin: {origin}") for origin in ORIGINS]),
    ("1000.*", [request("Origin: http://localhost") + BYE]),
    ("4.*|dropped", [request(f"X: {'x' * 70_000}"), request(*["X: x"] * 20_000)]),
    ("400 .*", [TWO_LENGTHS + b"0\r\n\r\n" + PLAIN, request("Content-Length: 1, 2") + b"xx"]),
    ("400 .*", [request("Host: evil.example"), request(without="Host"), request("nonsense")]),
    ("400 .*", [request("X: a\0b"), request("Host : evil.example")]),
    ("1000.*", [request("Content-Length: 2048") + bytes(2048) + BYE]),  # read, and ignored
    # It would be 1008 or 1009 if compression had been negotiated.
    ("dropped", [DEFLATE + frame(0xC2, zlib.compress(bytes(n), wbits=-15)) for n in SIZES]),
]
HALVES = [request() + b"\x81", request() + frame(0x81, b"x", length=100), request(), request()[:16]]


class Case(NamedTuple):
    """Something hostile, and a regular expression for the status, or for how it ended after 101."""

    expected: str
    data: bytes
    eof: bool = False  # nothing more is sent after it


CASES = [
    *(Case(end, request() + data) for end, several in FRAMES for data in several),
    *(Case(end, data) for end, several in REQUESTS for data in several),
    *(Case("dropped", data, eof=True) for data in HALVES),
]


def random_cases() -> Iterator[Case]:
    """Yield frames that lie, noise in place of frames, and handshakes with wrong bytes."""
    for number in range(226):  # EPOCH stands for the server's own
        data = bytearray(request(line="GET /websocket?epoch=EPOCH&offset=0 HTTP/1.1"))
        if number % 3 == 0:
            for _ in range(random.randrange(1, 6)):
                data += frame(
                    random.choice((0x80, 0x80, 0x80, 0, 0x90, 0xC0)) | random.randrange(16),
                    random.randbytes(random.choice((0, 1, 2, 50, 130, 2_000))),
                    masked=random.random() < 0.9,
                    length=random.choice((None, None, None, 5, 126, 2**40)),
                )
        elif number % 3 == 1:
            data += random.randbytes(random.randrange(1, 300))
        else:
            for _ in range(random.randrange(1, 9)):
                start = random.randrange(len(data))
                data[start : start + random.randrange(3)] = random.randbytes(random.randrange(3))
        yield Case(f"4.*|505.*|{ENDS}", bytes(data), eof=True)


async def provoke(stream: Stream, case: Case, patience: float = TIMEOUT) -> str:
    """Send something hostile; return the status, or how that connection ended after 101."""
    data = case.data.replace(b"EPOCH", stream.server.epoch.encode())
    async with raw(stream.url, data) as peer:
        if case.eof:
            peer.socket.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(patience):
                head = (await peer.read_until(b"\r\n\r\n")).decode()
                status = head.partition("\r\n")[0].partition(" ")[2]
                return await close_reason(peer) if status.startswith("101") else status
        except StreamClosedError:
            return "dropped"
        except TimeoutError:
            return "still open"


@dataclasses.dataclass
class Tally:
    """What became of the samples in one family of faults."""

    connections: int
    samples: int = 0  # those that should have arrived, over all clients
    lost: int = 0
    doubled: int = 0  # or out of order
    unsaid: int = 0  # by how many what each client has lost differs from what it has said
    noticed: bool = False  # whether the healthy client lost one, or a goodbye was none
    growth: float = 0  # of the server, in MB, where it is measured

    def count(self, client: Recorder, wanted: Sequence[int]) -> None:
        """Count what a client has seen, number by number."""
        seen = set(client.samples)
        lost = sum(number not in seen for number in wanted)
        self.samples += len(wanted)
        self.lost += lost
        self.doubled += sum(b <= a for a, b in itertools.pairwise(client.samples))
        self.unsaid += abs(lost - client.missed)

    async def add(self, stream: Stream, *clients: Recorder) -> None:
        """Count what the clients have seen once they, and the healthy one, have caught up."""
        await caught_up(stream, stream.control, *clients)
        self.noticed |= stream.control.samples != [*range(stream.end)]
        for client in clients:
            self.count(client, range(stream.end))


async def storm(
    pattern: Pattern,
    *,
    fault: Fault | None = None,
    count: int = 20,
    late: int = 0,
    seconds: float = 20,
    connections: int = 25,
    history_size: int = 10_000,
) -> Tally:
    """Let clients follow 1,000 samples/s behind proxies that misbehave, for so long at least."""
    async with contextlib.AsyncExitStack() as stack:
        stream = await stack.enter_async_context(serving(pattern, history_size=history_size))
        stream.send(late)
        proxies = [Proxy(stream.url, fault) for _ in range(count)]
        clients = [type(stream.control)(proxy.url) for proxy in proxies]
        for proxy in proxies:
            stack.callback(proxy.close)
        await stack.enter_async_context(following(*clients))
        await until(lambda: all(client.epoch for client in clients))
        await stream.flow(lambda: stream.end >= 1000 * seconds)
        await stream.flow(lambda: min(len(proxy.streams) for proxy in proxies) >= connections)
        tally = Tally(sum(len(proxy.streams) for proxy in proxies))
        await tally.add(stream, *clients)
    return tally


async def barrage(pattern: Pattern, *, cases: Sequence[Case]) -> Tally:
    """Provoke a server with one case after the other, beside a healthy client."""
    tally = Tally(len(cases) + 1)
    async with serving(pattern) as stream:
        for case in cases:
            await provoke(stream, case, patience=1)
            stream.send()
        await tally.add(stream, stream.control)
    return tally


async def vanishing(pattern: Pattern, *, seconds: float = 1, times: int = 5) -> Tally:
    """Let a peer vanish beside ten clients; it is dropped 5 s after it has missed a ping."""
    tally = Tally(11 * times)
    pings: dict[str, Any] = {"ping_interval": seconds, "ping_timeout": seconds}
    for _ in range(times):
        async with serving(pattern, **pings) as stream, raw(stream.url, request()) as peer:
            await peer.read_until(b"\r\n\r\n")
            dropped = asyncio.ensure_future(peer.read_until_close())
            async with following(*(clients := stream.more(9))):
                await until(lambda: len(WebSocketServer.clients) == 11)
                await stream.flow(dropped.done)
                await tally.add(stream, stream.control, *clients)
    return tally


async def crowd(pattern: Pattern, *, late: int = 10_000) -> Tally:
    """Let 500 clients come at once, so many samples late, and ask for all of them."""
    tally = Tally(501)
    async with serving(pattern) as stream:
        stream.send(late)
        async with following(*(clients := stream.more(500))):
            await until(lambda: len(stream.server.clients) == 501)
            stream.send(100)
            await tally.add(stream, stream.control, *clients)
    return tally


def serving_numbers(
    handler: type[WebSocketServer], first: int = 0, port: int = 0, interval: int = 5, batch: int = 1
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Serve numbers from `first` on in a process of its own, a batch every so many milliseconds."""
    numbers = f"faults.serve(faults.{handler.__name__}, {first}, {port}, {interval}, {batch})"
    code = f"from tests import faults; faults.server.run({numbers})"
    return running("-c", code, stderr=subprocess.DEVNULL)


async def serve(
    handler: type[WebSocketServer], first: int, port: int, interval: int, batch: int
) -> None:
    """Serve a stream of numbers, as such a process does."""
    numbers = itertools.count(first)
    send = lambda: handler.send_message([*itertools.islice(numbers, batch)])
    PeriodicCallback(send, interval).start()
    await server.serve(make_app(handler), port, "127.0.0.1")


async def bounces(
    pattern: Pattern,
    *,
    signals: Sequence[int] = (signal.SIGTERM, signal.SIGKILL) * 5,
    count: int = 5,
) -> Tally:
    """End a server with each of the signals, and start it again; clients follow every run."""
    tally = Tally(count * len(signals))
    handler, client_type = pattern
    with socket.socket() as holder:  # so that the port stays ours while the server is away
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        clients = [client_type(f"ws://127.0.0.1:{port}/websocket") for _ in range(count)]
        async with following(*clients):
            for first, number in zip(itertools.count(step=1_000_000), signals, strict=False):
                with serving_numbers(handler, first, port) as process:
                    goal = first + 100
                    there = lambda: all(max(c.samples, default=0) >= goal for c in clients)  # noqa: B023
                    await until(there)
                    process.send_signal(number)
                    code = await asyncio.to_thread(process.wait)
                await quiet(*clients)  # what is on its way when the server ends still comes
                ends = {client.samples[-1] for client in clients}
                tally.noticed |= number == signal.SIGTERM and (code != 0 or len(ends) > 1)
    for client in clients:
        runs = itertools.groupby(client.samples, lambda number: number // 1_000_000)
        seen = [(run * 1_000_000, max(numbers)) for run, numbers in runs]
        tally.count(client, [number for first, last in seen for number in range(first, last + 1)])
    return tally


def memory(process: subprocess.Popen[str]) -> float:
    """Return the resident memory of a process, in MB."""
    pages = Path(f"/proc/{process.pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize() / 1e6


async def never_reading(pattern: Pattern, *, seconds: float = 30, batch: int = 200) -> Tally:
    """Let ten peers never read 100 batches/s beside a client, whose history is then short, too."""
    tally = Tally(11)
    handler, client_type = pattern
    async with contextlib.AsyncExitStack() as stack:
        process = stack.enter_context(serving_numbers(handler, interval=10, batch=batch))
        control = client_type(first_line(process))
        for _ in range(10):
            await stack.enter_async_context(raw(control.url, request()))
        async with following(control):
            await until(lambda: len(control.samples) > 25_000)  # the history is full
            sizes = [await asyncio.sleep(0.1, memory(process)) for _ in range(int(10 * seconds))]
            count = len(control.samples)
            await until(lambda: len(control.samples) > count)  # and it still streams
    tally.growth = max(sizes) - sizes[0]
    tally.count(control, range(control.samples[0], control.samples[-1] + 1))
    return tally


async def measure() -> None:
    """Measure the pair and the plain loop in the same faults, and print the table."""
    random.seed(SEED)
    hostile = [*CASES, *random_cases()]
    barraged = f"{len(hostile)} hostile requests and frames, beside one healthy client"
    families: dict[str, Callable[[Pattern], Any]] = {
        "20 clients behind a proxy that resets, cuts, stalls, trickles": storm,
        "the same with a history of only 50 samples": partial(storm, history_size=50),
        barraged: partial(barrage, cases=hostile),
        "a peer that vanishes, beside ten healthy clients; five times": vanishing,
        "5 clients, the server restarted ten times": bounces,
        "500 clients at once, 10,000 samples late": crowd,
    }
    print("| fault | connections | samples | lost | doubled | plain loop: lost | doubled |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, family in families.items():
        ours, plain = await family(PAIR), await family(PLAIN_LOOP)
        said = ", all reported as missed" if ours.lost and not ours.unsaid else ""
        print(
            f"| {name} | {ours.connections:,} | {ours.samples:,} | {ours.lost:,}{said}"
            f" | {ours.doubled:,} | {plain.lost:,} of {plain.samples:,} | {plain.doubled:,} |",
            flush=True,
        )
    ours, plain = await never_reading(PAIR), await never_reading(PLAIN_LOOP)
    print(
        f"\nTen peers that never read 20,000 samples/s: the server grows by {ours.growth:.1f} MB in"
        f" 30 s, that of the plain loop by {plain.growth:.0f} MB in 30 s."
    )
    print(f"\nSEED={SEED}", file=sys.stderr)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    asyncio.run(measure())
