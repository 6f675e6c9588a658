"""The fast lane: each frame is built once and goes straight to the socket of every client.

You want it for thousands of clients. What comes within one turn of the event loop goes out
together, and a client that is behind is sent what it lacks in the ordinary way.

    python -m tests.recipes.fast_lane

serves the coin, until Ctrl-C. For a source of your own, subclass FastLane, or call its
`send_message`, and serve make_app(FastLane). The protocol is unchanged, and it works over TLS. It
needs only Tornado. Its limit: it leans on `ws_connection.stream`, which Tornado does not document.
Below a few hundred clients the ordinary way is fast enough.
"""

import asyncio
from typing import Any, ClassVar

from tornado.ioloop import PeriodicCallback
from tornado.iostream import IOStream

from server import RandomBernoulli, WebSocketServer, make_app, run, serve


def frame(text: bytes) -> bytes:
    """Return the frame that carries a text (RFC 6455, 5.2)."""
    size = len(text)
    long = [126, *size.to_bytes(2)] if size < 65_536 else [127, *size.to_bytes(8)]
    return bytes([0x81, *([size] if size < 126 else long)]) + text


def write(client: WebSocketServer, stream: IOStream, data: bytes) -> bool:
    """Write to the socket at once; tell whether something is left, which the stream takes."""
    try:
        sent = stream.socket.send(data)
    except OSError:  # no room, or no peer: the stream finds out which
        sent = 0
    if sent == len(data):
        return False
    stream.write(data[sent:]).add_done_callback(client.written)
    return True


class FastLane(WebSocketServer):
    begins: ClassVar[dict[type, int]] = {}  # of each stream: the offset of what waits for `feed`

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        begin, clients, cls.clients = cls.end, cls.clients, set()  # nobody is sent anything yet
        try:
            super().send_message(samples)
        finally:
            cls.clients = clients
        if cls not in cls.begins:
            cls.begins[cls] = begin
            asyncio.get_running_loop().call_soon(cls.feed)

    @classmethod
    def feed(cls) -> None:
        """Send what has come since the last turn of the event loop."""
        begin, end = cls.begins.pop(cls), cls.end
        fits = end - begin <= min(cls.message_size, len(cls.history))
        data = frame(cls.message(begin, end)) if fits else b""
        for client in cls.clients:
            peer: Any = client.ws_connection
            behind = type(client) is cls and client.position < end and not client.writing
            straight = behind and client.position == begin and data and peer
            if straight and not (peer.is_closing() or peer.stream.writing()):
                client.position, client.writing = end, write(client, peer.stream, data)
            elif behind:
                client.catch_up()


async def main() -> None:
    """Serve the coin until cancelled."""
    coin = RandomBernoulli(0.72)
    PeriodicCallback(lambda: FastLane.send_message([coin.sample()]), 100).start()
    await serve(make_app(FastLane))


if __name__ == "__main__":
    run(main())
