"""A proxy that misbehaves, a server that lies, hostile frames, and the plain loop to compare with.

`python -m tests.faults` measures the pair and the plain loop in the same faults, and prints the
table of README.md; `python -m tests.faults serve ...` is a server of numbered samples.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import logging
import math
import os
import random
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, ClassVar, Self

from tornado.httpserver import HTTPServer
from tornado.ioloop import PeriodicCallback
from tornado.netutil import bind_sockets
from tornado.util import import_object
from tornado.websocket import WebSocketHandler, WebSocketProtocol13, websocket_connect

from client import WebSocketClient
from server import WebSocketServer, make_app, run
from server import serve as serve_pair
from tests.support import ROOT, TIMEOUT, Recorder, first_line, fresh_server, until

SEED = int(os.environ.get("SEED") or secrets.randbelow(1_000_000))
LONG = os.environ.get("LONG_TESTS") == "1"

# ------------------------------------------------------------------------- the two patterns


class PlainServer(WebSocketHandler):
    """The plain pattern: write to one client after the other."""

    clients: ClassVar[set["PlainServer"]] = set()
    end = 0
    history_size = 10_000  # which bounds the batch only: this pattern keeps no history

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        """Send the samples to every client."""
        cls.end += len(samples)
        message = json.dumps(samples)
        for client in cls.clients:
            client.write_message(message)

    def open(self) -> None:
        """Welcome a client."""
        self.clients.add(self)

    def on_message(self, message: str | bytes) -> None:
        """Ignore what a client says."""

    def on_close(self) -> None:
        """Forget a client."""
        self.clients.discard(self)


class PlainClient:
    """The plain pattern: read until the connection ends, wait, connect again."""

    def __init__(self, url: str, retry_delay: float = 0.005) -> None:
        self.url = url
        self.retry_delay = retry_delay
        self.samples: list[int] = []
        self.missed = 0  # it cannot know

    async def run(self) -> None:
        """Follow the stream until cancelled."""
        while True:
            connection = None
            try:
                connection = await websocket_connect(self.url)
                while (message := await connection.read_message()) is not None:
                    self.samples += json.loads(message)
            except Exception:  # noqa: BLE001, S110 - the plain pattern, as it is found
                pass
            finally:
                if connection:
                    connection.close()
            await asyncio.sleep(self.retry_delay)


Server = type[WebSocketServer] | type[PlainServer]
Client = Recorder | PlainClient


@dataclasses.dataclass
class Tally:
    """What became of the samples in one family of faults."""

    connections: int = 0
    samples: int = 0  # those that should have arrived, over all clients
    lost: int = 0
    doubled: int = 0
    missed: int = 0  # those of the lost that the clients have said to be missed
    fewest: int = 0  # connections of the client that had the fewest

    def add(self, client: Client, wanted: range) -> None:
        """Count what a client has seen, number by number."""
        seen = collections.Counter(client.samples)
        self.samples += len(wanted)
        self.lost += sum(number not in seen for number in wanted)
        self.doubled += len(client.samples) - len(seen)
        self.missed += client.missed

    def __str__(self) -> str:
        return (
            f"{self.connections:,} connections, {self.samples:,} samples, {self.lost:,} lost"
            f" ({self.missed:,} said to be missed), {self.doubled:,} doubled"
        )


# ------------------------------------------------------------------- servers, clients, streams


@dataclasses.dataclass
class Stream:
    """A fresh server in this process, and where it listens."""

    server: Any  # a class: Server
    port: int
    sample: Callable[[int], Any] = int  # the sample at an offset: the offset itself

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/websocket"

    @property
    def end(self) -> int:
        return int(self.server.end)

    @property
    def samples(self) -> list[Any]:
        """All the samples that there have been."""
        return [self.sample(offset) for offset in range(self.end)]

    def send(self, count: int = 1) -> None:
        """Send so many samples."""
        self.server.send_message([self.sample(self.end + n) for n in range(count)])


def fresh(handler: Server, **attributes: Any) -> Server:
    """Return a subclass of the handler with a log and clients of its own."""
    if issubclass(handler, WebSocketServer):
        return fresh_server(handler, **attributes)
    return type("Fresh", (handler,), {"clients": set(), "end": 0} | attributes)


@contextlib.asynccontextmanager
async def serving(
    handler: Server,
    address: str = "127.0.0.1",
    port: int = 0,
    buffer: int | None = None,
    idle: float = 10,
    settings: dict[str, Any] | None = None,
    **attributes: Any,
) -> AsyncIterator[Stream]:
    """Serve in this event loop; `buffer` is the size in bytes of the kernel's, per connection."""
    server = fresh(handler, **attributes)
    (listener,) = bind_sockets(port, address)
    if buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    app = make_app(server)  # type: ignore[arg-type]  # the plain one is served in the same way
    app.settings.update(settings or {})
    http_server = HTTPServer(
        app, idle_connection_timeout=idle, body_timeout=idle, max_body_size=1024
    )
    http_server.add_socket(listener)
    try:
        yield Stream(server, listener.getsockname()[1])
    finally:
        http_server.stop()
        await http_server.close_all_connections()
        for client in list(server.clients):
            client.close(1001)
        await until(lambda: not server.clients)


@contextlib.asynccontextmanager
async def following(*clients: WebSocketClient | PlainClient) -> AsyncIterator[None]:
    """Run the clients in this event loop."""
    tasks = [asyncio.ensure_future(client.run()) for client in clients]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def streaming(stream: Stream, interval: float = 10, batch: int = 10) -> Iterator[None]:
    """Send a batch of numbered samples every so many milliseconds."""
    ticks = PeriodicCallback(lambda: stream.send(batch), interval)
    ticks.start()
    try:
        yield
    finally:
        ticks.stop()


async def streamed(stream: Stream, count: int) -> None:
    """Wait until so many more samples have been sent, however slow the machine is."""
    goal = stream.end + count
    while (start := stream.end) < goal:
        await until(lambda: stream.end >= min(start + 1000, goal))


async def at(client: WebSocketClient, position: int) -> None:
    """Wait until the client stands at this position or beyond."""
    await until(lambda: client.position >= position)


async def ended(process: subprocess.Popen[str]) -> int:
    """Wait until the process has ended, and return its exit code."""
    await until(lambda: process.poll() is not None)
    return process.returncode


async def caught_up(stream: Stream, *clients: Client) -> None:
    """Wait until the clients stand at the end; until they are quiet, if they cannot know that."""
    for client in clients:
        if isinstance(client, Recorder):
            await at(client, stream.end)
    plain = [client for client in clients if isinstance(client, PlainClient)]
    seen = -1
    while plain and seen != (seen := sum(len(client.samples) for client in plain)):
        await asyncio.sleep(0.5)


@contextlib.contextmanager
def python(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run Python with these arguments, and with a pipe for its output; kill it at the end."""
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL} | options
    command = [sys.executable, "-W", "error", *arguments]
    with subprocess.Popen(command, text=True, cwd=ROOT, **outputs) as process:
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """Yield a port that stays ours while a server on it comes and goes, refused in between."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        if sys.platform != "linux":
            holder.close()  # elsewhere, a second socket cannot be bound beside this one
            yield 0
        else:
            yield holder.getsockname()[1]


# --------------------------------------------------------------------------------- the proxy


@dataclasses.dataclass
class Fault:
    """How the proxy treats one connection, from the server to the client."""

    shape: str = "whole"  # or trickle, slices (of one byte, where it is small), latency, slow
    life: float = math.inf  # seconds from the first byte to the ending; below 0, none passes
    ending: str = "close"  # or reset, cut, stall


def random_faults(rng: random.Random) -> Iterator[Fault]:
    """Yield faults of all shapes and endings, for connections that live 0.3 s on average."""
    shapes = ("whole", "whole", "whole", "trickle", "slices", "latency")
    while True:
        ending = rng.choice(("close", "reset", "cut", "stall"))
        yield Fault(rng.choice(shapes), rng.uniform(-0.03, 0.6), ending)


class Peer:
    """Something that listens on a port of its own, and serves each connection in a task."""

    def __init__(self) -> None:
        self.connections = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.setblocking(False)
        self.port = self.listener.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/websocket"

    async def __aenter__(self) -> Self:
        # asyncio's own server leaves connections open that come while it closes.
        asyncio.get_running_loop().add_reader(self.listener, self.accept)
        return self

    async def __aexit__(self, *error: object) -> None:
        asyncio.get_running_loop().remove_reader(self.listener)
        self.listener.close()
        await asyncio.sleep(0)  # a task that is cancelled before it begins closes nothing
        for task in list(self.tasks):
            task.cancel()
        await until(lambda: not self.tasks)

    def accept(self) -> None:
        """Accept a connection, and serve it in a task."""
        accepted, _ = self.listener.accept()
        self.connections += 1
        task = asyncio.ensure_future(self.connection(accepted))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def connection(self, accepted: socket.socket) -> None:
        """Serve a connection, and close it."""
        reader, writer = await asyncio.open_connection(sock=accepted)
        try:
            await self.serve(reader, writer)
        finally:
            await closed(writer)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve a connection."""
        raise NotImplementedError


class Proxy(Peer):
    """A TCP proxy to a port of this machine; each connection suffers the next of the faults."""

    def __init__(
        self, port: int, faults: Iterator[Fault], rng: random.Random, buffer: int = 0
    ) -> None:
        super().__init__()
        self.target = port
        self.faults = faults
        self.rng = rng
        self.buffer = buffer  # bytes, of the kernel's on the server's side; 0 leaves it alone

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass bytes on in both directions, until either side or the fault ends it."""
        fault = next(self.faults)
        async with contextlib.AsyncExitStack() as stack:
            upstream = socket.socket()
            upstream.setblocking(False)
            if self.buffer:
                upstream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer)
            try:
                address = ("127.0.0.1", self.target)
                await asyncio.get_running_loop().sock_connect(upstream, address)
            except OSError:
                upstream.close()
                return
            limit = self.buffer or 2**16
            source, sink = await asyncio.open_connection(sock=upstream, limit=limit)
            stack.push_async_callback(closed, sink)
            there = asyncio.ensure_future(self.pass_on(reader, sink, Fault()))
            back = asyncio.ensure_future(self.pass_on(source, writer, fault))
            try:
                await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                back.cancel()
                await asyncio.gather(there, back, return_exceptions=True)

    async def pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault
    ) -> None:
        """Pass bytes on in one direction, in the shape and up to the ending of the fault."""
        loop = asyncio.get_running_loop()
        end, passed = None, 0
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(700 if fault.shape == "slow" else 2**16):
                end = end or loop.time() + fault.life
                if fault.shape == "slow":  # 35 kB/s, even if a sleep takes too long
                    passed += len(data)
                    begin = end - fault.life
                    await asyncio.sleep(max(0, begin + passed / 35_000 - loop.time()))
                if loop.time() < end:
                    await self.shaped(writer, data, fault.shape)
                    continue
                if fault.ending == "cut":
                    await self.shaped(writer, data[: self.rng.randrange(1, len(data))], "whole")
                    return
                if fault.ending == "stall":
                    await asyncio.sleep(self.rng.uniform(0.2, 0.8))
                if fault.ending in ("reset", "stall"):
                    linger(writer)
                return

    async def shaped(self, writer: asyncio.StreamWriter, data: bytes, shape: str) -> None:
        """Pass one piece on."""
        size = {"trickle": 512, "slices": 1 + len(data) // 500}.get(shape, len(data))
        for start in range(0, len(data), size):
            if shape == "latency":
                await asyncio.sleep(self.rng.uniform(0.04, 0.06))
            writer.write(data[start : start + size])
            await writer.drain()
            await asyncio.sleep(0.02 if shape == "trickle" else 0)


def linger(writer: asyncio.StreamWriter) -> None:
    """Make the coming close a reset."""
    if not writer.transport.is_closing():
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close a connection, and wait until it is closed, in whatever way it ends."""
    writer.close()
    try:
        async with asyncio.timeout(1):
            await writer.wait_closed()
    except OSError:
        pass  # reset, or not closed in time
    finally:
        writer.transport.abort()


# ------------------------------------------------------------------------------ a false server


Reply = Callable[[bytes], bytes]  # from the key of a handshake to all that the server says


def canned(head: str) -> Reply:
    """Say the same to everybody."""
    return lambda key: head.encode()


def accept_and_say(frames: bytes) -> Reply:
    """Accept the handshake, and send these frames."""
    return lambda key: accept(key) + frames


def accept(key: bytes) -> bytes:
    """Accept a handshake, and say nothing more."""
    return (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: "
        + WebSocketProtocol13.compute_accept_value(key).encode()
        + b"\r\n\r\n"
    )


def text(payload: str | bytes) -> bytes:
    """Make the frame of a text message from a server."""
    return frame(1, payload.encode() if isinstance(payload, str) else payload, masked=False)


class FakeServer(Peer):
    """Answers every handshake with canned bytes, which may depend on its key."""

    def __init__(self, reply: Reply, *, hold: bool = False, deaf: bool = False) -> None:
        super().__init__()
        self.reply = reply
        self.hold = hold  # keep the connection until the client says goodbye
        self.deaf = deaf  # keep the connection for good, and read nothing more
        self.sent = 0  # bytes
        self.codes: list[int] = []  # those with which clients have said goodbye

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Say what is canned, then read until the client says goodbye or is gone."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            key = next(
                line.split(b": ")[1]
                for line in head.split(b"\r\n")
                if line.lower().startswith(b"sec-websocket-key")
            )
            reply = self.reply(key)
            for start in range(0, len(reply), 2**16):
                writer.write(reply[start : start + 2**16])
                await writer.drain()
                self.sent += len(reply[start : start + 2**16])
            if self.deaf:
                await asyncio.Future()
            while self.hold and (data := await reader.read(2**16)):
                if data[0] == 0x88:  # a Close frame, whose payload is masked
                    mask, code = struct.unpack("!HxxH", data[2:8])
                    self.codes.append(mask ^ code)
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass


# ---------------------------------------------------------------------------------- raw frames


def frame(
    opcode: int,
    payload: bytes = b"",
    *,
    final: bool = True,
    reserved: int = 0,
    masked: bool = True,
    length: int | None = None,
) -> bytes:
    """Make a frame, which may lie about everything; `length` is what it announces."""
    size = len(payload) if length is None else length
    bit = 0x80 if masked else 0
    head = bytes([(0x80 if final else 0) | reserved << 4 | opcode])
    if size < 126:
        head += bytes([bit | size])
    elif size < 2**16:
        head += bytes([bit | 126]) + struct.pack("!H", size)
    else:
        head += bytes([bit | 127]) + struct.pack("!Q", size)
    if not masked:
        return head + payload
    mask = b"\x01\x02\x03\x04"
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


def request(line: str = "", *more: str, without: Sequence[str] = ()) -> bytes:
    """Make a handshake with further header lines, or without some of the usual ones."""
    line = line or "GET /websocket HTTP/1.1"
    usual = {
        "Host": "127.0.0.1",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    lines = [f"{name}: {value}" for name, value in usual.items() if name not in without]
    return "\r\n".join([line, *lines, *more, "", ""]).encode()


def asking(query: str) -> bytes:
    """Make a handshake with a query; EPOCH in it stands for the server's own."""
    return request(f"GET /websocket?{query} HTTP/1.1")


@dataclasses.dataclass
class Case:
    """Something hostile, and the answer to it, as a regular expression."""

    row: str
    name: str
    data: bytes
    expected: str
    accepted: bool = False  # the data follows a good handshake
    eof: bool = False  # nothing more is sent after it


def frames(row: str, name: str, *data: bytes, expected: str = ".*", eof: bool = False) -> Case:
    """Make a case of frames after a good handshake."""
    return Case(row, name, b"".join(data), expected, accepted=True, eof=eof)


def close_frame(code: int, reason: bytes = b"") -> bytes:
    """Make a Close frame."""
    return frame(8, struct.pack("!H", code) + reason)


BYE = close_frame(1000)

CASES = [
    frames("W1", "text", frame(1, b"hello"), expected="1008 this stream is read-only"),
    frames("W1", "binary", frame(2, b"\x00\xff"), expected="1008 this stream is read-only"),
    frames("W1", "empty text", frame(1), expected="1008 this stream is read-only"),
    frames("W1", "empty binary", frame(2), expected="1008 this stream is read-only"),
    frames("W1", "two at once", frame(1, b"1") * 2, expected="1008 this stream is read-only"),
    frames("W1", "in fragments", frame(1, b"a", final=False), frame(0, b"b"), expected="1008.*"),
    frames("W1", "of exactly 1 KiB", frame(1, b"x" * 1024), expected="1008.*"),
    frames("W3", "one byte too many", frame(1, b"x" * 1025), expected="1009.*|dropped"),
    frames("W3", "100 kB", frame(2, bytes(100_000)), expected="1009.*|dropped"),
    frames("W3", "announced 2**63", frame(2, length=2**63), expected="1009.*|dropped"),
    frames("W3", "announced 2**64 - 1", frame(1, length=2**64 - 1), expected="1009.*|dropped"),
    frames(
        "W3",
        "endless fragments",
        frame(1, b"x", final=False),
        frame(0, b"x" * 100, final=False) * 100,
        expected="1009.*|dropped",
    ),
    frames("W6", "invalid UTF-8", frame(1, b"\xff\xfe"), expected="dropped"),
    frames("W6", "overlong UTF-8", frame(1, b"\xc0\x80"), expected="dropped"),
    frames("W6", "a surrogate in UTF-8", frame(1, b"\xed\xa0\x80"), expected="dropped"),
    frames("W6", "half a character", frame(1, b"\xe2\x82"), expected="dropped"),
    *(
        frames("W6", f"RSV bits {bits}", frame(1, b"x", reserved=bits), expected="dropped")
        for bits in (1, 2, 4, 7)
    ),
    *(
        frames("W6", f"reserved opcode {opcode}", frame(opcode, b"x"), expected="dropped")
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    ),
    frames("W6", "a ping of 126 bytes", frame(9, bytes(126)), expected="dropped"),
    frames("W6", "a ping of 64 KiB", frame(9, bytes(2**16)), expected="dropped"),
    frames("W6", "half a ping", frame(9, b"x", final=False), expected="dropped"),
    frames("W6", "half a pong", frame(10, b"x", final=False), expected="dropped"),
    frames("W6", "half a Close", frame(8, b"", final=False), expected="dropped"),
    frames("W6", "nothing to continue", frame(0, b"x"), expected="dropped"),
    frames("W6", "nothing to go on with", frame(0, b"x", final=False), expected="dropped"),
    frames(
        "W6", "a message in a message", frame(1, b"x", final=False) + frame(1), expected="dropped"
    ),
    frames("W6", "a Close of one byte", frame(8, b"\x03")),
    frames("W6", "a Close that is not UTF-8", close_frame(1000, b"\xff")),
    frames("W6", "a Close that is too long", close_frame(1000, bytes(124)), expected="dropped"),
    frames("W6", "two Close frames", BYE + BYE),
    frames("W6", "text after a Close", BYE + frame(1, b"x")),
    *(
        frames("W6", f"a Close with code {code}", close_frame(code))
        for code in (0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535)
    ),
    frames("W6", "unmasked text", frame(1, b"x", masked=False)),
    frames("W6", "unmasked ping, then a Close", frame(9, b"x", masked=False), BYE),
    frames("W6", "a pong that nobody asked for", frame(10, b"x"), BYE),
    frames("W6", "half a header", b"\x81", eof=True),
    frames("W6", "half a payload", frame(1, b"x", length=100), eof=True),
    frames("W6", "nothing at all", eof=True),
    frames("W6", "a request in place of frames", request(), expected=".*"),
    frames("W13", "a ping flood", frame(9, bytes(100)) * 20_000, BYE, expected="1000.*"),
    Case("W14", "GET", b"GET /websocket HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", "400 .*"),
    Case("W14", "POST", request("POST /websocket HTTP/1.1", "Content-Length: 0"), "405 .*"),
    Case("W14", "a wrong path", request("GET /elsewhere HTTP/1.1"), "404 .*"),
    Case("W14", "the root", request("GET / HTTP/1.1"), "404 .*"),
    Case("W14", "a longer path", request("GET /websocket/x HTTP/1.1"), "404 .*"),
    Case(
        "W14",
        "version 8",
        request(
            "GET /websocket HTTP/1.1",
            "Sec-WebSocket-Version: 8",
            without=["Sec-WebSocket-Version"],
        ),
        "426 .*",
    ),
    Case("W14", "no key", request(without=["Sec-WebSocket-Key"]), "400 .*"),
    Case("W14", "no upgrade", request(without=["Upgrade"]), "400 .*"),
    Case("W14", "a method of its own", request("WATCH /websocket HTTP/1.1"), "405 .*"),
    Case("W14", "no HTTP at all", b"hello\r\n\r\n", "400 .*|dropped"),
    Case("W14", "a TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", "400 .*|dropped"),
    *(
        Case(
            "I1", f"offset {name}", asking(f"epoch=EPOCH&offset={offset}"), "400 offset must be .*"
        )
        for name, offset in {
            "-1": "-1",
            "abc": "abc",
            "empty": "",
            "1_0": "1_0",
            "1.0": "1.0",
            "+1": "%2B1",
            "in Arabic digits": "%D9%A1%D9%A2",
            "of 16 digits": "1" * 16,
            "of 18 zeros and a digit": "0" * 18 + "1",
            "of 5,000 digits": "1" * 5_000,
            "%FF": "%FF",
            "twice, then wrong": "0&offset=x",
            "ahead": "999999999",
        }.items()
    ),
    Case("I1", "no offset", asking("epoch=EPOCH"), "400 offset must be .*"),
    Case("I3", "no epoch", asking("offset=0"), "101 .*"),
    Case("I3", "an offset that is none", asking("epoch=another&offset=abc"), "101 .*"),
    Case("I3", "an unknown epoch", asking("epoch=ffffffff&offset=7"), "101 .*"),
    Case("I3", "an empty epoch", asking("epoch=&offset=7"), "101 .*"),
    Case("I3", "an epoch that is not UTF-8", asking("epoch=%FF%FE&offset=7"), "101 .*"),
    Case("I3", "5,000 characters", asking(f"epoch={'e' * 5_000}&offset=7"), "101 .*"),
    Case("S1", "a foreign page", request("", "Origin: http://evil.example"), "403 .*"),
    Case("S1", "a page from nowhere", request("", "Origin: null"), "403 .*"),
    Case("S1", "another port", request("", "Origin: http://127.0.0.1:1"), "403 .*"),
    Case("S1", "the own origin", request("", "Origin: http://127.0.0.1"), "101 .*"),
    Case("S5", "70 kB of headers", request("", f"X: {'x' * 70_000}"), "4.*|dropped"),
    Case("S5", "20,000 headers", request("", *["X: x"] * 20_000), "4.*|dropped"),
    Case(
        "S5",
        "two lengths of one body",
        request("POST /websocket HTTP/1.1", "Transfer-Encoding: chunked", "Content-Length: 4")
        + b"0\r\n\r\nGET /websocket HTTP/1.1\r\n\r\n",
        "400 .*",
    ),
    Case("S5", "two different lengths", request("", "Content-Length: 1, 2") + b"xx", "400 .*"),
    Case("S5", "two hosts", request("", "Host: evil.example"), "400 .*"),
    Case("S5", "no host", request(without=["Host"]), "400 .*"),
    Case("S5", "a body of 2 KiB", request("", "Content-Length: 2048") + bytes(2048), "4.*|dropped"),
    Case("S5", "a header without a colon", request("", "nonsense"), "400 .*"),
    Case("S5", "a NUL in a header", request("", "X: a\0b"), "400 .*"),
    Case("S5", "a space before the colon", request("", "Host : evil.example"), "400 .*"),
    Case("S5", "half a request", b"GET /websocket HT", "dropped", eof=True),
]


def random_cases(rng: random.Random, count: int) -> Iterator[Case]:
    """Yield frames that lie, noise in place of frames, and handshakes with wrong bytes."""
    for number in range(count):
        match rng.choice(("frames", "noise", "handshake")):
            case "frames":
                data = b"".join(
                    frame(
                        rng.randrange(16),
                        rng.randbytes(rng.choice((0, 1, 2, 50, 130, 2_000))),
                        final=rng.random() < 0.7,
                        reserved=rng.choice((0, 0, 0, 0, 1, 4)),
                        masked=rng.random() < 0.9,
                        length=rng.choice((None, None, None, 5, 126, 2**40)),
                    )
                    for _ in range(rng.randrange(1, 6))
                )
                accepted = True
            case "noise":
                data, accepted = rng.randbytes(rng.randrange(1, 300)), True
            case _:
                wrong = bytearray(asking("epoch=EPOCH&offset=0"))
                for _ in range(rng.randrange(1, 9)):
                    start = rng.randrange(len(wrong))
                    wrong[start : start + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
                data, accepted = bytes(wrong), False
        yield Case("W6", f"random {number}: {data[:60]!r}", data, ".*", accepted, eof=True)


async def provoke(stream: Stream, case: Case, patience: float = TIMEOUT) -> str:
    """Send something hostile; return how that connection ended, or the status that it got."""
    reader, writer = await asyncio.open_connection("127.0.0.1", stream.port)
    try:
        async with asyncio.timeout(patience):
            if case.accepted:
                writer.write(request())
                await reader.readuntil(b"\r\n\r\n")
            writer.write(case.data.replace(b"EPOCH", getattr(stream.server, "epoch", "").encode()))
            if case.eof:
                writer.write_eof()
            if case.accepted:
                return await close_code(reader)
            status = (await reader.readline()).decode().split(maxsplit=1)
            return status[1].strip() if status else "dropped"
    except (asyncio.IncompleteReadError, ConnectionError):
        return "dropped"
    except TimeoutError:
        return "still open"
    finally:
        linger(writer)
        await closed(writer)


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read a frame from a server, and return its opcode and its payload."""
    first, size = await reader.readexactly(2)
    if size == 126:
        (size,) = struct.unpack("!H", await reader.readexactly(2))
    elif size == 127:
        (size,) = struct.unpack("!Q", await reader.readexactly(8))
    return first & 15, await reader.readexactly(size)


async def close_code(reader: asyncio.StreamReader) -> str:
    """Read frames from a server up to its Close frame, and return the code and the reason."""
    while True:
        opcode, payload = await read_frame(reader)
        if opcode == 8:
            code = struct.unpack("!H", payload[:2])[0] if payload else "no code"
            return f"{code} {payload[2:].decode()}".strip()


# ------------------------------------------------------------------- the families of faults


async def storm(
    handler: Server,
    client_type: type[Client],
    rng: random.Random,
    seconds: float,
    connections: int = 0,
    **attributes: Any,
) -> Tally:
    """Let 20 clients follow 1,000 samples/s through proxies that misbehave, beside a healthy one.

    It goes on for at least so many seconds' worth of samples, and so many connections of each.
    """
    tally = Tally()
    async with contextlib.AsyncExitStack() as stack:
        stream = await stack.enter_async_context(serving(handler, **attributes))
        proxies = [Proxy(stream.port, random_faults(rng), rng) for _ in range(20)]
        for proxy in proxies:
            await stack.enter_async_context(proxy)
        control = client_type(stream.url)
        clients = [client_type(proxy.url) for proxy in proxies]
        await stack.enter_async_context(following(control, *clients))
        await until(lambda: len(stream.server.clients) == 21)
        await until(lambda: all(c.epoch for c in (control, *clients) if isinstance(c, Recorder)))
        with streaming(stream):
            await streamed(stream, int(1000 * seconds))
            await until(lambda: min(proxy.connections for proxy in proxies) >= connections)
        await caught_up(stream, control, *clients)
        if control.samples != list(range(stream.end)) and isinstance(control, Recorder):
            raise AssertionError("the healthy client has noticed the storm")
        for client in clients:
            tally.add(client, range(stream.end))
            if (
                isinstance(client, Recorder)
                and client.position != len(client.samples) + client.missed
            ):
                raise AssertionError(f"{client.missed} missed of {client.position} is wrong")
        tally.connections = sum(proxy.connections for proxy in proxies)
        tally.fewest = min(proxy.connections for proxy in proxies)
    return tally


async def barrage(
    handler: Server,
    client_type: type[Client],
    cases: Sequence[Case],
    answered: Callable[[Case, str], None] = lambda case, outcome: None,
    patience: float = TIMEOUT,
) -> Tally:
    """Provoke a server with one case after the other, beside a healthy client."""
    tally = Tally(connections=len(cases) + 1)
    async with serving(handler) as stream, following(control := client_type(stream.url)):
        await until(lambda: stream.server.clients)
        for case in cases:
            answered(case, await provoke(stream, case, patience))
            with contextlib.suppress(Exception):  # which the plain loop lets out, and is tallied
                stream.send()
            if isinstance(control, Recorder):
                await caught_up(stream, control)
                if control.samples != list(range(stream.end)):
                    raise AssertionError(f"the healthy client has noticed {case.name}")
        await caught_up(stream, control)
        tally.add(control, range(stream.end))
    return tally


async def vanishing(handler: Server, client_type: type[Client], interval: float) -> Tally:
    """Let a peer vanish beside ten clients; it is dropped 5 s after it has missed a ping."""
    settings = {"websocket_ping_interval": interval, "websocket_ping_timeout": interval}
    clients: list[Client] = []
    tally = Tally(connections=11)
    async with serving(handler, settings=settings) as stream, contextlib.AsyncExitStack() as stack:
        reader, writer = await asyncio.open_connection("127.0.0.1", stream.port)
        stack.push_async_callback(closed, writer)
        writer.write(request())
        await reader.readuntil(b"\r\n\r\n")
        dropped = asyncio.gather(reader.read(), return_exceptions=True)
        clients += [client_type(stream.url) for _ in range(10)]
        await stack.enter_async_context(following(*clients))
        await until(lambda: len(stream.server.clients) == 11)
        with streaming(stream):
            for _ in range(3):  # 25 s at most, and a condition is polled for up to 30 s
                with contextlib.suppress(AssertionError):
                    await until(dropped.done)
                    break
            else:
                raise AssertionError("the peer that has vanished is still there")
        await caught_up(stream, *clients)
        for client in clients:
            tally.add(client, range(stream.end))
    return tally


async def vanishing_often(handler: Server, client_type: type[Client]) -> Tally:
    """Add up five peers that vanish, since a set has no order: the plain loop may meet it last."""
    total = Tally()
    for _ in range(5):
        tally = await vanishing(handler, client_type, 1)
        total.connections += tally.connections
        total.samples += tally.samples
        total.lost += tally.lost
        total.doubled += tally.doubled
        total.missed += tally.missed
    return total


async def crowd(handler: Server, client_type: type[Client], late: int = 10_000) -> Tally:
    """Let 500 clients come at once, so many samples late, and ask for all of them."""
    count = 500
    tally = Tally(connections=count + 1)
    async with serving(handler) as stream, following(control := client_type(stream.url)):
        await until(lambda: stream.server.clients)
        stream.send(late)
        await caught_up(stream, control)
        clients = [client_type(stream.url) for _ in range(count)]
        async with following(*clients):
            await until(lambda: len(stream.server.clients) == count + 1)
            stream.send(100)
            await caught_up(stream, control, *clients)
        for client in (control, *clients):
            tally.add(client, range(stream.end))
    return tally


@contextlib.contextmanager
def serving_numbers(
    handler: Server, first: int = 0, port: int = 0, interval: int = 5, batch: int = 1
) -> Iterator[subprocess.Popen[str]]:
    """Serve numbers from `first` on in a process of its own, a batch every so many milliseconds."""
    name = f"{handler.__module__}.{handler.__qualname__}"
    numbers = [str(number) for number in (first, port, interval, batch)]
    with python("-m", "tests.faults", "serve", name, *numbers) as process:
        yield process


async def bounces(
    handler: Server, client_type: type[Client], signals: Sequence[signal.Signals]
) -> Tally:
    """End a server with each of the signals, and start it again; five clients follow every run."""
    tally = Tally()
    with reserved_port() as port:
        clients = [client_type(f"ws://127.0.0.1:{port}/websocket") for _ in range(5)]
        async with following(*clients):
            for run, number in enumerate(signals):
                first = run * 1_000_000
                with serving_numbers(handler, first, port) as process:
                    first_line(process)  # it is back
                    goal = first + 100
                    await until(lambda: all(c.samples and c.samples[-1] >= goal for c in clients))  # noqa: B023
                    process.send_signal(number)
                    if await ended(process) != 0 and number == signal.SIGTERM:
                        raise AssertionError(f"exit code {process.returncode}")
                tally.connections += len(clients)
                sizes = [-1]
                while sizes != (sizes := [len(client.samples) for client in clients]):
                    await asyncio.sleep(0.1)  # what is on its way when the server ends still comes
                last = {client.samples[-1] for client in clients}
                if number == signal.SIGTERM and len(last) > 1:
                    raise AssertionError(f"a server said goodbye at different offsets: {last}")
        for client in clients:
            wanted = itertools.chain.from_iterable(
                range(run * 1_000_000, 1 + max(n for n in client.samples if n // 1_000_000 == run))
                for run in range(len(signals))
            )
            one = Tally()
            numbers = list(wanted)
            one.add(client, range(0))
            tally.doubled += one.doubled
            tally.missed += one.missed
            tally.samples += len(numbers)
            tally.lost += len(set(numbers) - set(client.samples))
    return tally


def memory(process: subprocess.Popen[str]) -> float:
    """Return the resident memory of a process, in MB."""
    with open(f"/proc/{process.pid}/statm", encoding="ascii") as numbers:
        return int(numbers.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


async def never_reading(
    handler: Server,
    client_type: type[Client],
    seconds: float,
    batch: int = 200,
    limit: float = math.inf,
) -> tuple[float, float]:
    """Let ten peers never read; return the server's growth in MB, and the seconds that it took.

    The server sends 100 batches a second. It ends early when it has grown by more than the limit.
    """
    loop = asyncio.get_running_loop()
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(serving_numbers(handler, interval=10, batch=batch))
        url = first_line(process)
        address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        for _ in range(10):
            peer = stack.enter_context(socket.socket())
            # Small buffers and segments, or the kernel takes in some MB for each of them.
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
            peer.connect(address)
            peer.send(request())
        async with following(control := client_type(url)):
            await until(lambda: len(control.samples) > 25_000)  # the history is full
            before, start = memory(process), loop.time()
            after = before
            while loop.time() < start + seconds and after - before < limit:
                await asyncio.sleep(0.1)
                after = max(after, memory(process))
            taken = loop.time() - start
            count = len(control.samples)
            await until(lambda: len(control.samples) > count)  # and it still streams
        # At this rate the history is short, for a healthy client as well.
        lost = control.samples[-1] + 1 - control.samples[0] - len(set(control.samples))
        if lost != control.missed and isinstance(control, Recorder):
            raise AssertionError(f"the healthy client has lost {lost} samples")
    return after - before, taken


async def serve(name: str, first: str, port: str, interval: str, batch: str) -> None:
    """Serve a stream of numbers with a handler by its dotted name."""
    handler = import_object(name)
    numbers = itertools.count(int(first))

    def tick() -> None:
        handler.send_message(list(itertools.islice(numbers, int(batch))))

    PeriodicCallback(tick, float(interval)).start()
    await serve_pair(make_app(handler), int(port), "127.0.0.1")


# --------------------------------------------------------------------------------- the table


async def measure() -> None:
    """Measure the pair and the plain loop in the same faults, and print the table."""
    both: list[tuple[Server, type[Client]]] = [
        (WebSocketServer, Recorder),
        (PlainServer, PlainClient),
    ]
    hostile = [*CASES, *random_cases(random.Random(SEED), 200)]
    signals = [signal.SIGTERM, signal.SIGKILL] * 5
    families: list[tuple[str, Callable[[Server, type[Client]], Any]]] = [
        (
            "20 clients behind a proxy that resets, cuts, stalls, trickles",
            lambda s, c: storm(s, c, random.Random(SEED), 20, 25 if s is WebSocketServer else 0),
        ),
        (
            "the same with a history of only 50 samples",
            lambda s, c: storm(s, c, random.Random(SEED), 20, history_size=50),
        ),
        (
            f"{len(hostile)} hostile requests and frames, beside one healthy client",
            lambda s, c: barrage(s, c, hostile, patience=1),
        ),
        ("a peer that vanishes, beside ten healthy clients; five times", vanishing_often),
        ("5 clients, the server restarted ten times", lambda s, c: bounces(s, c, signals)),
        ("500 clients at once, 10,000 samples late", crowd),
    ]
    print("| fault | connections | samples | lost | doubled | plain loop: lost | doubled |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for name, family in families:
        ours, plain = [await family(server, client) for server, client in both]
        lost = f"{ours.lost:,}" + (
            ", all reported as missed" if ours.missed == ours.lost > 0 else ""
        )
        print(
            f"| {name} | {ours.connections:,} | {ours.samples:,} | {lost} | {ours.doubled:,}"
            f" | {plain.lost:,} of {plain.samples:,} | {plain.doubled:,} |",
            flush=True,
        )
    (ours_mb, _), (plain_mb, seconds) = [
        await never_reading(server, client, 30, limit=500) for server, client in both
    ]
    print(
        f"\nTen peers that never read 20,000 samples/s: the server grows by {ours_mb:.1f} MB in"
        f" 30 s, that of the plain loop by {plain_mb:.0f} MB in {seconds:.0f} s."
    )
    print(f"\nSEED={SEED}", file=sys.stderr)


def main() -> None:
    """Print the table, or serve numbered samples."""
    if sys.argv[1:2] == ["serve"]:
        run(serve(*sys.argv[2:]))
        return
    argparse.ArgumentParser(description=__doc__).parse_args()
    logging.disable(logging.CRITICAL)
    asyncio.run(measure())


if __name__ == "__main__":
    main()
