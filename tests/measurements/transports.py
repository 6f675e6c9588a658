"""Five transports, each between two Tornado processes; benchmark.py compares them."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

from tornado.http1connection import HTTP1Connection
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.iostream import IOStream
from tornado.tcpclient import TCPClient
from tornado.tcpserver import TCPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler

from client import parse
from server import Stream
from tests.measurements.contestants import CONTESTANTS, Contestant, Send, Take, listen
from tests.measurements.measuring import Server

streams: list[Stream] = []  # the one that this process serves
moved: list[int] = []  # the bytes of each reading and writing of this process


async def messages() -> AsyncIterator[str]:
    position = 0
    while True:
        await until_beyond(position)
        message, position = streams[0].read(position)
        yield message


async def until_beyond(position: int) -> None:
    while position >= streams[0].end:
        await streams[0].grown.wait()


def taken(message: bytes, take: Take) -> int:
    """Hand over the samples of a message, and return the position after it."""
    _, offset, samples = parse(message.decode())
    take(samples)
    return offset + len(samples)


# The transports: a server and a client each, as short as they can be, none of them reconnecting.


class EventsSide(RequestHandler):
    async def get(self) -> None:
        self.set_header("Content-Type", "text/event-stream")
        cast(HTTP1Connection, self.request.connection).stream.set_nodelay(True)
        async for message in messages():
            self.write(f"data: {message}\n\n")
            await self.flush()


async def receive_events(url: str, take: Take) -> None:
    rest = b""

    def on_chunk(chunk: bytes) -> None:
        nonlocal rest
        *events, rest = (rest + chunk).split(b"\n\n")
        for event in events:
            taken(event.removeprefix(b"data: "), take)

    url = url.replace("ws", "http", 1)
    await AsyncHTTPClient().fetch(HTTPRequest(url, streaming_callback=on_chunk, request_timeout=0))


class PollSide(RequestHandler):
    async def get(self) -> None:
        self.finish(streams[0].read(int(self.get_query_argument("offset")))[0])


class LongPollSide(PollSide):
    async def get(self) -> None:
        await until_beyond(int(self.get_query_argument("offset")))
        await super().get()


async def receive_by_polling(url: str, take: Take, pause: float = 0) -> None:
    url, position = url.replace("ws", "http", 1), 0
    while True:
        response = await AsyncHTTPClient().fetch(f"{url}?offset={position}")
        position = taken(response.body, take)
        await asyncio.sleep(pause)


class TCPSide(TCPServer):
    async def handle_stream(self, stream: IOStream, address: Any) -> None:
        stream.set_nodelay(True)
        async for message in messages():
            await stream.write(message.encode() + b"\n")


async def receive_tcp(url: str, take: Take) -> None:
    stream = await TCPClient().connect("127.0.0.1", cast(int, urlsplit(url).port))
    while True:
        taken(await stream.read_until(b"\n"), take)


async def serve(side: type, pings: bool, port: int) -> tuple[int, Send]:
    """Serve a stream by a transport; return the port, and what appends to the stream."""
    streams.append(Stream())
    if side is TCPSide:
        listener, port = bind_unused_port()
        TCPSide().add_socket(listener)
    else:
        port = listen(Application([("/websocket", side)]), pings, port)
    return port, streams[0].append


TRANSPORTS = {
    "WebSocket": CONTESTANTS["plain Tornado"],
    "Server-Sent Events": Contestant(partial(serve, EventsSide), receive_events),
    "HTTP polling": Contestant(partial(serve, PollSide), partial(receive_by_polling, pause=0.01)),
    "HTTP long polling": Contestant(partial(serve, LongPollSide), receive_by_polling),
    "plain TCP": Contestant(partial(serve, TCPSide), receive_tcp),
}


async def count_bytes(server: Server) -> None:
    """Note what each connection of this process reads and writes from now on."""
    for method in IOStream.read_from_fd, IOStream.write_to_fd:

        def counted(stream: IOStream, data: Any, method: Any = method) -> int | None:
            moved.append(method(stream, data) or 0)
            return moved[-1] or None

        setattr(IOStream, method.__name__, counted)


async def bytes_moved(server: Server) -> int:
    """Return the bytes that this process has read and written."""
    return sum(moved)
