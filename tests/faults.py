"""Links that break, and bytes that break the rules: the tools of the fault tests."""

import asyncio
import contextlib
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpserver import TCPServer
from tornado.testing import bind_unused_port

from tests.support import HANDSHAKE, PATIENCE, until, url_at

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10  # opcodes


def request(*more: str, method: str = "GET") -> bytes:
    """Make a handshake with further header lines."""
    _, *usual = HANDSHAKE.decode().strip().split("\r\n")
    return "\r\n".join([f"{method} /websocket HTTP/1.1", *usual, *more, "", ""]).encode()


def frame(
    opcode: int, payload: bytes = b"", *, final: bool = True, reserved: int = 0, masked: bool = True
) -> bytes:
    """Make a frame, also one that breaks the rules; its mask is of zeros, and changes nothing."""
    size, mask = len(payload), masked << 7
    if size < 126:
        length = bytes([mask | size])
    elif size < 2**16:
        length = struct.pack("!BH", mask | 126, size)
    else:
        length = struct.pack("!BQ", mask | 127, size)
    return bytes([final << 7 | reserved << 4 | opcode]) + length + bytes(4 * masked) + payload


def reset(stream: IOStream) -> None:
    """Close a connection with a reset, as a peer does that has crashed."""
    if not stream.closed():
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()


async def connect(url: str) -> IOStream:
    """Connect with a small buffer and tiny segments, which keep the server's buffer small, too.

    Otherwise, the kernel holds megabytes for a peer that never reads.
    """
    stream = IOStream(socket.socket())
    stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    if sys.platform != "win32":
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
    return await stream.connect(("127.0.0.1", urlsplit(url).port))


@contextlib.asynccontextmanager
async def raw_client(url: str, data: bytes) -> AsyncIterator[IOStream]:
    """Connect to a server and send these bytes; at the end, reset the connection."""
    stream = await connect(url)
    try:
        stream.write(data)
        yield stream
    finally:
        reset(stream)


async def read_frame(peer: IOStream) -> tuple[int, bytes]:
    """Read the next frame of the server that is not a ping; return its opcode and its payload."""
    opcode, payload = PING, b""
    async with asyncio.timeout(PATIENCE):
        while opcode == PING:
            head, size = await peer.read_bytes(2)
            if size > 125:
                size = int.from_bytes(await peer.read_bytes(2 if size == 126 else 8))
            opcode, payload = head & 15, await peer.read_bytes(size)
    return opcode, payload


async def answer(url: str, data: bytes, *, then_end: bool = False) -> str:
    """Send bytes; return the status, the code of the Close frame that follows 101, or "dropped"."""
    async with raw_client(url, data) as stream, asyncio.timeout(PATIENCE):
        try:
            if then_end:  # the server learns that no more bytes follow
                stream.socket.shutdown(socket.SHUT_WR)
            status = (await stream.read_until(b"\r\n\r\n")).decode().split()[1]
            if status != "101":
                return status
            while True:
                opcode, payload = await read_frame(stream)
                if opcode == CLOSE:
                    return str(int.from_bytes(payload[:2]))
        except StreamClosedError:
            return "dropped"


class Pace(NamedTuple):
    """How bytes pass on their way to a client."""

    piece: int = 2**16  # bytes at once, at most
    pause: float = 0  # seconds before each piece, on average


WHOLE, BYTEWISE, LATE = Pace(), Pace(piece=1), Pace(pause=0.05)
TRICKLE, SLOW = Pace(512, 0.02), Pace(1_280, 0.02)  # 25 and 64 kB/s, less what a pause is late


class Proxy(TCPServer):
    """Passes bytes between a server and a client that comes back when its connection is broken."""

    def __init__(self, url: str) -> None:
        super().__init__()
        listener, port = bind_unused_port()
        self.add_socket(listener)
        self.url, self.server = url_at(port), url
        self.pace = WHOLE
        self.streams: list[IOStream] = []  # to the client, one for each time that it has come
        self.busy = 0  # connections that are still open
        self.passed = 0  # bytes that have passed to the client
        self.cutting = False  # whether the next piece is the last one, and not complete
        self.passing = asyncio.Lock()  # held by a stall, and while a piece goes to the client

    async def aclose(self) -> None:
        """Stop listening, and close the connections."""
        self.stop()
        await self.drop()
        await until(lambda: self.busy == 0, lambda: self.busy)

    # The faults. They are coroutines, so that a test can await any of them.

    async def drop(self) -> None:
        """Close the connection without a Close frame."""
        for stream in self.streams:
            stream.close()

    async def reset(self) -> None:
        """Reset the connection."""
        for stream in self.streams:
            reset(stream)

    async def cut(self) -> None:
        """Let a part of what comes next pass, and close the connection."""
        self.cutting = True
        await until(lambda: not self.cutting)

    async def stall(self) -> None:
        """Let nothing pass for a moment, and then reset the connection."""
        async with self.passing:
            await asyncio.sleep(random.uniform(0.2, 0.8))  # the fault itself
            await self.reset()

    async def misbehave(self) -> None:
        """End one connection after the other, each after 0.3 s on average, until cancelled."""
        while True:
            self.pace = random.choice((WHOLE, WHOLE, WHOLE, TRICKLE, LATE))
            await asyncio.sleep(random.uniform(0, 0.6))  # the life of this connection
            await random.choice((self.drop, self.reset, self.cut, self.stall))()

    async def forge(self, data: bytes) -> None:
        """Send the client what the server has not sent, and wait until it has hung up."""
        stream = self.streams[-1]
        await stream.write(data)
        await until(stream.closed)

    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Pass bytes on in both directions, until either side or a fault ends the connection."""
        self.streams.append(stream)
        self.busy += 1
        try:
            with (
                contextlib.suppress(StreamClosedError),
                contextlib.closing(stream),
                contextlib.closing(await connect(self.server)) as server,
            ):
                await asyncio.gather(self.pass_up(stream, server), self.pass_down(server, stream))
        finally:
            self.busy -= 1

    async def pass_up(self, client: IOStream, server: IOStream) -> None:
        while True:
            await server.write(await client.read_bytes(2**16, partial=True))

    async def pass_down(self, server: IOStream, client: IOStream) -> None:
        while True:
            data = await server.read_bytes(self.pace.piece, partial=True)
            await asyncio.sleep(random.uniform(0.8, 1.2) * self.pace.pause)
            async with self.passing:
                if self.cutting:
                    self.cutting = False
                    await client.write(data[: random.randrange(len(data))])
                    raise StreamClosedError  # which ends both directions
                await client.write(data)
                self.passed += len(data)
