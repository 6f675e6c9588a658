"""The fast lane: each frame is built once, and goes straight to the socket of every client.

You want it for thousands of clients. What comes in one turn of the event loop goes out together. A
client whose socket is full is fed in the ordinary way, until it is up to date again.

    python -m tests.recipes.fast_lane

serves the coin, until Ctrl-C. For a source of your own, write make_fast_app() instead of make_app().
The protocol is unchanged, and it works over TLS. It needs only Tornado. Its limit: it uses
`ws_connection.stream`, which Tornado does not document; and for a client that reads slowly, the
server holds two messages instead of one. Below a few hundred clients the ordinary way is fast
enough.
"""

import asyncio
from typing import Any

from tornado.ioloop import PeriodicCallback
from tornado.iostream import IOStream
from tornado.web import Application

from server import RandomBernoulli, Stream, WebSocketServer, make_app, run, serve


def frame(text: bytes) -> bytes:
    """Return the WebSocket frame that carries a text (RFC 6455, 5.2)."""
    size = len(text)
    if size < 126:
        return bytes([0x81, size]) + text
    if size < 65_536:
        return bytes([0x81, 126]) + size.to_bytes(2, "big") + text
    return bytes([0x81, 127]) + size.to_bytes(8, "big") + text


def write(stream: IOStream, data: bytes) -> None:
    """Write to the socket at once; what does not fit is left to Tornado's stream."""
    try:
        sent = stream.socket.send(data)
    except OSError:  # no room, or no peer: the stream finds out which
        sent = 0
    if sent < len(data):
        stream.write(data[sent:])


class FastStream(Stream):
    """A stream that sends what is new to all clients that have everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.delivered = 0  # the position of a client that is up to date, until `deliver` is called

    def grow(self, texts: list[str]) -> None:
        if texts and self.delivered == self.end:  # the first samples in this turn of the event loop
            self.loop.call_soon(self.deliver)
        super().grow(texts)

    def deliver(self) -> None:
        """Send the next message to all clients that are up to date; they need no task for it."""
        message, position = self.read(self.delivered)
        data = frame(message.encode())
        for client in tuple(WebSocketServer.clients):
            connection: Any = client.ws_connection
            if client.stream is not self or connection is None or connection.is_closing():
                continue
            if client.position == self.delivered and not connection.stream.writing():
                client.feeding.cancel()
                client.position = position
                write(connection.stream, data)
            if client.position < self.end and client.feeding.cancelling():
                client.feeding = asyncio.create_task(client.feed())  # the ordinary way
        self.delivered = self.end


def make_fast_app(handler: type[WebSocketServer] = WebSocketServer) -> Application:
    """Make a stream, and the application that serves it at /websocket, as make_app does."""
    app = make_app(handler)
    handler.stream = FastStream()
    return app


async def main() -> None:
    """Serve the coin until cancelled."""
    coin, app = RandomBernoulli(0.72), make_fast_app()
    PeriodicCallback(lambda: WebSocketServer.send_message([coin.sample()]), 100).start()
    await serve(app)


if __name__ == "__main__":
    run(main())
