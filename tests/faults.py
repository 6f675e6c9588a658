"""Links that break, and bytes that break the rules: the tools of the fault tests."""

import asyncio
import contextlib
import random
import socket
import struct
import sys
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

from tornado.iostream import IOStream, StreamClosedError
from tornado.tcpserver import TCPServer
from tornado.testing import bind_unused_port

from tests.support import HANDSHAKE, PATIENCE, until

CONTINUATION, TEXT, CLOSE, PING, PONG = 0, 1, 8, 9, 10  # opcodes


def request(*more: str, method: str = "GET") -> bytes:
    """Make a handshake with further header lines."""
    _, *usual = HANDSHAKE.decode().strip().split("\r\n")
    return "\r\n".join([f"{method} /websocket HTTP/1.1", *usual, *more, "", ""]).encode()


def frame_head(
    opcode: int, length: int, *, final: bool = True, reserved: int = 0, masked: bool = True
) -> bytes:
    """Make what stands before the payload of a frame; the mask is of zeros, and changes nothing."""
    size, width = (length, 0) if length < 126 else (126, 2) if length < 2**16 else (127, 8)
    head = bytes([final << 7 | reserved << 4 | opcode, masked << 7 | size])
    return head + length.to_bytes(8)[8 - width :] + bytes(4 * masked)


def frame(opcode: int, payload: bytes = b"", **head: Any) -> bytes:
    """Make a frame, which may break every rule of RFC 6455 but that of its length."""
    return frame_head(opcode, len(payload), **head) + payload


def reset(stream: IOStream) -> None:
    """Close a connection with a reset, as a peer does that has crashed."""
    if not stream.closed():
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()


async def connect(url: str) -> IOStream:
    """Connect with a small buffer and segments, or the kernel takes in MB for who never reads."""
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


async def answer(url: str, data: bytes, *, then_end: bool = False) -> str:
    """Send bytes; return the status, the code of the Close frame that follows 101, or "dropped"."""
    async with raw_client(url, data) as stream, asyncio.timeout(PATIENCE):
        try:
            if then_end:  # the server learns that no more bytes follow
                stream.socket.shutdown(socket.SHUT_WR)
            status = (await stream.read_until(b"\r\n\r\n")).decode().split()[1]
            while status == "101":  # read frames
                first, size = await stream.read_bytes(2)
                if size == 126:
                    size = int.from_bytes(await stream.read_bytes(2))
                payload = await stream.read_bytes(size)
                if first & 15 == CLOSE:
                    return str(int.from_bytes(payload[:2]))
            return status
        except StreamClosedError:
            return "dropped"


class Proxy(TCPServer):
    """Passes bytes between one client and a server, and does to the link what it is told.

    How bytes pass on their way to the client: `whole`, `bytewise`, `trickle`, `late`.
    How the connection ends: `close`, `reset`, `cut`, `stall`. Afterwards the client may come back.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        listener, port = bind_unused_port()
        self.add_socket(listener)
        self.url = f"ws://127.0.0.1:{port}/websocket"
        self.server = url
        self.streams: list[IOStream] = []  # to the client, one for each time that it has come
        self.busy = 0  # connections that are still open
        self.passed = 0  # bytes that have passed to the client on the newest one
        self.cutting = False  # whether the next piece is the last one, and not complete
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.whole()

    async def aclose(self) -> None:
        """Stop listening, and close the connections."""
        self.stop()
        await self.close()
        await until(lambda: self.busy == 0, lambda: self.busy)

    def whole(self) -> None:
        """Let everything pass as it comes."""
        self.piece, self.pause = 2**16, 0.0  # bytes at once, and seconds before them on average

    def bytewise(self) -> None:
        """Let each byte pass by itself."""
        self.piece, self.pause = 1, 0.0

    def trickle(self) -> None:
        """Let 25 kB/s pass, in pieces of 512 bytes."""
        self.piece, self.pause = 512, 0.02

    def late(self) -> None:
        """Let everything pass 50 ms late, with jitter."""
        self.piece, self.pause = 2**16, 0.05

    async def close(self) -> None:
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
        self.flowing.clear()
        try:
            await asyncio.sleep(random.uniform(0.2, 0.8))  # the fault itself
        finally:
            await self.reset()
            self.flowing.set()

    async def misbehave(self) -> None:
        """End one connection after the other, each after 0.3 s on average, until cancelled."""
        while True:
            random.choice((self.whole, self.whole, self.whole, self.trickle, self.late))()
            await asyncio.sleep(random.uniform(0, 0.6))  # the life of this connection
            await random.choice((self.close, self.reset, self.cut, self.stall))()

    async def forge(self, data: bytes) -> None:
        """Say something to the client that the server has not said, and wait until it is gone."""
        stream = self.streams[-1]
        await stream.write(data)
        await until(stream.closed)

    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        """Pass bytes on in both directions, until either side or a fault ends the connection."""
        self.streams.append(stream)
        self.busy += 1
        self.passed = 0
        with contextlib.suppress(StreamClosedError):
            server = await connect(self.server)
            with contextlib.closing(server), contextlib.closing(stream):
                await asyncio.gather(self.pass_up(stream, server), self.pass_down(server, stream))
        self.busy -= 1

    async def pass_up(self, client: IOStream, server: IOStream) -> None:
        while True:
            await server.write(await client.read_bytes(2**16, partial=True))

    async def pass_down(self, server: IOStream, client: IOStream) -> None:
        while True:
            data = await server.read_bytes(self.piece, partial=True)
            await asyncio.sleep(random.uniform(0.8, 1.2) * self.pause)
            await self.flowing.wait()
            if self.cutting:
                self.cutting = False
                await client.write(data[: random.randrange(len(data))])
                client.close()
            await client.write(data)
            self.passed += len(data)
