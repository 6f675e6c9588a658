"""Stream samples of a Bernoulli variable over WebSockets to every client that is connected."""

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import random
import secrets
import signal
import sys
from typing import Any, ClassVar
from urllib.parse import parse_qsl

from tornado import httpserver, ioloop, netutil, web, websocket

log = logging.getLogger("server")


class RandomBernoulli:
    """A coin that shows 1 with probability p, and 0 otherwise. Replace it by your own source."""

    def __init__(self, p: float) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be from 0 to 1, not {p}")
        self.p = p

    def sample(self) -> int:
        return int(random.random() < self.p)


class WebSocketServer(websocket.WebSocketHandler):
    """An instance is one client; the class holds the log of all. A subclass has its own log."""

    clients: ClassVar[set["WebSocketServer"]] = set()  # those of all subclasses, too
    max_clients = 900  # each is an open file, and Linux lets a process have 1,024
    epoch = secrets.token_hex(4)  # which run of the server the offsets belong to
    end = 0  # the offset of the next sample, that is, how many there have been
    history: ClassVar[list[Any]] = []  # the newest samples, those before the end
    history_size = 10_000  # samples, at least 1
    message_size = 1_000  # samples in one message, at least 1
    position = 0  # of each client: the offset of the next sample that it needs
    writing = False  # of each client: whether the last write to it is unfinished

    def __init_subclass__(cls) -> None:
        for name, own in {"epoch": secrets.token_hex(4), "end": 0, "history": []}.items():
            setattr(cls, name, vars(cls).get(name, own))  # what its body sets stays

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        """Append a list of what JSON can hold to the log, and send it to the clients of this class.

        Call it in the event loop's thread; if it raises, nothing has changed. Clients miss samples
        if more than `history_size` come before the event loop runs again.
        """
        asyncio.get_running_loop()  # RuntimeError in any other thread
        if not isinstance(samples, list):
            raise TypeError(f"samples must be a list, not {samples!r:.80}")
        cls.history += json.loads(json.dumps(samples, allow_nan=False))  # the log's own copy
        del cls.history[: -cls.history_size]
        cls.end += len(samples)
        for client in cls.clients:
            if type(client) is cls and client.position < cls.end and not client.writing:
                client.catch_up()

    @classmethod
    @functools.lru_cache(maxsize=8)  # most clients need the same message
    def message(cls, offset: int, end: int) -> bytes:
        """Encode a part of the history; cached, since an offset always means the same sample."""
        oldest = cls.end - len(cls.history)
        samples = cls.history[offset - oldest : end - oldest]
        return json.dumps({"epoch": cls.epoch, "offset": offset, "samples": samples}).encode()

    def prepare(self) -> None:
        if len(self.clients) >= self.max_clients:
            raise web.HTTPError(503, reason="too many clients")
        query = dict(parse_qsl(self.request.query))
        if query.get("epoch") == self.epoch:  # any other client gets the whole history
            text = query.get("offset", "")
            # isdigit alone takes "²", which int refuses, as it does 5,000 digits.
            if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text) <= self.end):
                raise web.HTTPError(400, reason=f"offset must be a number from 0 to {self.end}")
            self.position = int(text)

    def open(self) -> None:
        self.clients.add(self)
        log.info("client %s connected, %d in all", self.request.remote_ip, len(self.clients))
        self.set_nodelay(True)  # or small messages wait for the acknowledgement of earlier ones
        self.catch_up()  # even if there is nothing yet: it tells the client where it stands

    def catch_up(self) -> None:
        """Send what this client lacks and the history has, up to `message_size` samples of it."""
        offset = max(self.position, self.end - len(self.history))
        self.position = min(offset + self.message_size, self.end)
        self.writing = True  # until it is written, so a slow client gets fewer, larger messages
        try:
            self.write_message(self.message(offset, self.position)).add_done_callback(self.written)
        except Exception as error:  # noqa: BLE001 - whatever is wrong, it costs the others nothing
            if not isinstance(error, websocket.WebSocketClosedError):  # it was open
                log.warning("client %s dropped: %r", self.request.remote_ip, error)
            self.close()

    def written(self, future: asyncio.Future[None]) -> None:
        """Send what this client still lacks, now that the last write is finished."""
        self.writing = False  # asking for exception() below keeps asyncio from logging it
        if not (future.cancelled() or future.exception()) and self.position < self.end:
            self.catch_up()

    def on_message(self, message: str | bytes) -> None:
        self.close(1008, "this stream is read-only")

    def on_close(self) -> None:
        self.clients.discard(self)
        log.info("client %s closed, %d left", self.request.remote_ip, len(self.clients))


def make_app(handler: type[WebSocketServer] = WebSocketServer) -> web.Application:
    """Make the application that serves the stream at /websocket."""
    pings: Any = {"websocket_ping_interval": 10, "websocket_ping_timeout": 10}  # seconds
    return web.Application([("/websocket/?", handler)], websocket_max_message_size=1024, **pings)


async def serve(
    app: web.Application, port: int = 8765, address: str = "localhost", ssl_options: Any = None
) -> None:
    """Print the URL and serve until cancelled, then tell all clients that the server goes away."""
    if not address or not 0 <= port <= 65_535:  # an empty one would open it to the whole network
        raise ValueError(f"address must not be empty, port from 0 to 65535: {address!r}, {port}")
    host = f"[{address}]" if ":" in address else address
    limits = {"idle_connection_timeout": 10, "body_timeout": 10}  # seconds, for silent peers
    server = httpserver.HTTPServer(app, ssl_options=ssl_options, **limits)
    sockets: list[Any] = []
    try:
        sockets += netutil.bind_sockets(port, address)  # port 0 takes a free one
        server.add_sockets(sockets)
        port = sockets[0].getsockname()[1]
        print(f"{'wss' if ssl_options else 'ws'}://{host}:{port}/websocket", flush=True)
        await asyncio.Event().wait()  # which nobody sets: until cancelled
    except (OSError, UnicodeError) as error:
        sys.stdout = None if sockets else sys.stdout  # or Python would print again as it exits
        raise SystemExit(f"cannot serve on {host}:{port}: {error}") from error
    finally:
        server.stop()
        while WebSocketServer.clients:  # on_close removes each, after 5 s at most
            for client in list(WebSocketServer.clients):
                client.catch_up()  # a last message, with up to message_size of what it lacks
                client.close(1001, "going away")
            await asyncio.sleep(0.01)


async def main() -> None:
    """Sample and serve until cancelled."""
    parser = argparse.ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_argument("--address", default="localhost", help="to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    parser.add_argument("--p", type=float, default=0.72, help="probability of a 1 (%(default)s)")
    parser.add_argument("--interval", type=int, default=100, help="in milliseconds (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="samples per message (%(default)s)")
    try:
        options = parser.parse_args()
        if min(options.interval, options.batch) < 1:
            raise ValueError("interval and batch must be at least 1")
        coin = RandomBernoulli(options.p)
        toss = lambda: WebSocketServer.send_message([coin.sample() for _ in range(options.batch)])
        ioloop.PeriodicCallback(toss, options.interval).start()
        await serve(make_app(), options.port, options.address)
    except (argparse.ArgumentError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def run(coroutine: Any) -> None:
    """Log, and run a coroutine until Ctrl-C or SIGTERM; after a second one, wait for no client."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    with asyncio.Runner() as runner, contextlib.suppress(asyncio.CancelledError):
        loop = runner.get_loop()
        task = loop.create_task(coroutine)
        for number in signal.SIGINT, signal.SIGTERM:  # Windows has no loop.add_signal_handler
            signal.signal(number, lambda *_: task.done() or loop.call_soon_threadsafe(task.cancel))
        loop.run_until_complete(task)


if __name__ == "__main__":
    run(main())
