"""Stream tosses of a biased coin over WebSockets to every client that is connected.

The stream is a numbered log, and a client is a position in it. A client connects to

    ws://localhost:8765/websocket                              the first time
    ws://localhost:8765/websocket?epoch=9f86d081&offset=1500   when it comes back

and gets one message after another, each a text in JSON:

    {"epoch": "9f86d081", "offset": 1500, "samples": [1, 0, 1]}

The epoch names this run of the stream. The offset is the number of the first sample, counted from
0: the next message begins at 1503. The server keeps the newest samples, the history. A client that
comes back too late gets a later offset, and so sees how many samples it has missed. To a client
without an epoch, or with an old one, the server sends the whole history.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import re
import secrets
import signal
from collections.abc import Coroutine
from ssl import SSLContext
from typing import Any, ClassVar

from tornado import httpserver, ioloop, netutil, websocket
from tornado.web import Application, HTTPError

logger = logging.getLogger("server")


class RandomBernoulli:
    """A coin that shows 1 with probability p, and 0 otherwise. Replace it with your own source."""

    def __init__(self, p: float) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be from 0 to 1, not {p}")
        self.p = p

    def sample(self) -> int:
        return int(random.random() < self.p)


class Stream:
    """A numbered log, of which the newest samples are kept. Make it while an event loop runs."""

    history_size = 10_000  # samples that are kept; if you append more at once, some are missed
    message_size = 1_000  # samples in one message: at most so many, but at least 1

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.epoch = secrets.token_hex(4)
        self.end = 0  # the offset of the next sample
        self.history: list[str] = []  # the newest samples, each as JSON
        self.grown = asyncio.Event()  # wakes all clients that wait for more samples
        self.cached = ("", 0)  # what `read` returned last
        self.cache_key = (-1, -1)  # the position and the end that `cached` is for

    def append(self, samples: list[Any]) -> None:
        """Append samples, each anything that JSON can hold. Any thread may call this.

        TypeError or ValueError if one of them cannot be sent: then none is appended.
        """
        if not isinstance(samples, list):
            raise TypeError(f"samples must be a list, not {samples!r:.80}")
        # One call for all samples is ten times as fast as one for each. But if a sample has ", "
        # inside, this makes more parts than there are samples.
        texts = json.dumps(samples, allow_nan=False)[1:-1].split(", ")
        if len(texts) != len(samples):
            texts = [json.dumps(sample, allow_nan=False) for sample in samples]
        if any(len(text) > 10_000_000 for text in texts):
            raise ValueError("a sample is too long: a client takes 10 MiB at most")
        self.loop.call_soon_threadsafe(self.grow, texts)

    def grow(self, texts: list[str]) -> None:
        self.history += texts
        self.end += len(texts)
        del self.history[: max(0, len(self.history) - self.history_size)]
        self.grown.set()  # releases every client that waits now
        self.grown.clear()  # does not undo that; a later wait() waits for later samples

    def read(self, position: int) -> tuple[str, int]:
        """Return the next message for a client at this position, and the position after it."""
        if self.cache_key != (position, self.end):  # most clients need the same message
            oldest = self.end - len(self.history)
            offset = max(position, oldest)
            texts = self.history[offset - oldest :][: max(1, self.message_size)]
            # On a slow network, a ping that waits behind a longer message would time out.
            while len(texts) > 1 and sum(map(len, texts)) > 64_000:
                texts = texts[: len(texts) // 2]
            message = '{"epoch": %s, "offset": %d, "samples": [%s]}'
            message %= (json.dumps(self.epoch), offset, ", ".join(texts))
            self.cached = message, offset + len(texts)
            self.cache_key = position, self.end
        return self.cached


class WebSocketServer(websocket.WebSocketHandler):
    """One client: Tornado makes an instance for each connection. The class has what they share.

    A subclass that is given to make_app has its own stream. If it overrides `prepare`, `open` or
    `on_close`, it must call super(); an `async def prepare` does that last.
    """

    clients: ClassVar[set["WebSocketServer"]] = set()  # subclasses share this set
    max_clients = 900  # each is an open file, and Linux usually allows a process 1,024
    stream: ClassVar[Stream]  # make_app makes it
    gone = False  # whether Tornado has called on_close

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        """Append samples to the stream, as `Stream.append` does. Any thread may call this."""
        if "stream" not in vars(cls):  # its own, not that of the parent class
            raise RuntimeError(f"{cls.__name__} is not served: call make_app({cls.__name__}) first")
        cls.stream.append(samples)

    # Tornado calls prepare when a client asks to connect, open when it is connected, on_message
    # when it has sent something, and on_close when it has left.

    def prepare(self) -> None:
        if len(self.clients) >= self.max_clients:
            raise HTTPError(503, reason="too many clients")
        self.position = 0  # the offset of the next sample that this client needs
        if self.get_query_argument("epoch", "") == self.stream.epoch:
            offset = self.get_query_argument("offset", "", strip=False)
            if not re.fullmatch("[0-9]{1,15}", offset) or int(offset) > self.stream.end:
                raise HTTPError(400, reason=f"offset must be from 0 to {self.stream.end}")
            self.position = int(offset)

    def open(self) -> None:
        if not self.gone:  # it may have left while a subclass awaited something in `prepare`
            self.set_nodelay(True)  # or a small message waits until the last one is confirmed
            self.feeding = asyncio.Task(self.feed())  # create_task might begin it inside `open`
            self.clients.add(self)
            logger.info("client %s connected, %d in all", self.request.remote_ip, len(self.clients))

    async def feed(self) -> None:
        """Send what this client lacks, wait for more, and so on, until the client has left.

        A slow client keeps only its own task waiting, and gets fewer, longer messages.
        """
        try:
            while True:  # the first message may be empty: it tells the client where it stands
                message, self.position = self.stream.read(self.position)
                await self.write_message(message)
                # Nothing can be appended between this test and the moment when it waits.
                while self.position >= self.stream.end:
                    await self.stream.grown.wait()
        except Exception as error:
            if not isinstance(error, websocket.WebSocketClosedError):
                logger.exception("client %s cannot be served", self.request.remote_ip)
                self.close(1011, "internal error")
            await asyncio.sleep(6)  # Tornado calls on_close within 5 s, which cancels this task;
            self.on_close()  # but if `open` of a subclass has failed, Tornado never calls it

    def on_message(self, message: str | bytes) -> None:
        self.close(1008, "this stream is read-only")

    def on_close(self) -> None:
        self.gone = True
        if self in self.clients:
            self.clients.remove(self)
            logger.info("client %s closed, %d left", self.request.remote_ip, len(self.clients))
            self.feeding.cancel()


def make_app(handler: type[WebSocketServer] = WebSocketServer) -> Application:
    """Make a stream, and the application that serves it at /websocket. Call it in a coroutine."""
    if any(type(client) is handler for client in handler.clients):
        raise RuntimeError(f"{handler.__name__} is served already, and has clients")
    handler.stream = Stream()
    # A client is pinged every 10 s, and has 10 s to answer. It has nothing to send but that.
    routes = [("/websocket", handler)]
    return Application(routes, websocket_ping_interval=10, websocket_max_message_size=1024)


async def serve(
    app: Application, port: int = 8765, address: str = "localhost", ssl: SSLContext | None = None
) -> None:
    """Serve until cancelled, then say goodbye to the clients. OSError if the port is taken."""
    if not address or not 0 <= port <= 65_535:  # without an address, Tornado listens on all of them
        raise ValueError(f"address must not be empty, port from 0 to 65535: {address!r}, {port}")
    host = f"[{address}]" if ":" in address else address
    # A connection that sends no complete request is closed after 10 s.
    http = httpserver.HTTPServer(app, ssl_options=ssl, idle_connection_timeout=10, body_timeout=10)
    try:
        sockets = netutil.bind_sockets(port, address)
    except (OSError, UnicodeError) as error:
        raise OSError(f"cannot serve on {host}:{port}: {error}") from error
    http.add_sockets(sockets)
    scheme = "wss" if ssl else "ws"
    logger.info("serving %s://%s:%d/websocket", scheme, host, sockets[0].getsockname()[1])
    try:
        await asyncio.Event().wait()  # for ever: nobody sets it
    finally:
        http.stop()
        await http.close_all_connections()  # those that are not clients yet
        ours = [client for client in WebSocketServer.clients if client.application is app]
        for client in ours:
            client.close(1001, "going away")
        if ours:  # Tornado waits 5 s for an answer, then on_close ends the task
            await asyncio.wait([client.feeding for client in ours], timeout=6)


async def main() -> None:
    """Toss the coin and serve, until cancelled."""
    parser = argparse.ArgumentParser(description="Stream tosses of a biased coin.")
    parser.add_argument("--address", default="localhost", help="to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    parser.add_argument("--p", type=float, default=0.72, help="probability of a 1 (%(default)s)")
    parser.add_argument("--interval", type=int, default=100, help="in milliseconds (%(default)s)")
    options = parser.parse_args()
    try:
        coin = RandomBernoulli(options.p)
        app = make_app()
        toss = lambda: WebSocketServer.send_message([coin.sample()])
        ioloop.PeriodicCallback(toss, options.interval).start()
        await serve(app, options.port, options.address)
    except ValueError as error:
        parser.error(str(error))


def run(program: Coroutine[Any, Any, None]) -> None:
    """Run a program such as `main()` until Ctrl-C or SIGTERM; an OSError ends it with one line."""
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    problem: BaseException | None = None
    with contextlib.suppress(asyncio.CancelledError, KeyboardInterrupt), asyncio.Runner() as runner:
        loop = runner.get_loop()
        # Tornado writes in tasks. Since Python 3.12, these can begin at once, which is cheaper.
        loop.set_task_factory(getattr(asyncio, "eager_task_factory", None))
        task = loop.create_task(program)
        with contextlib.suppress(NotImplementedError):  # on Windows, Ctrl-C ends it anyway
            loop.add_signal_handler(signal.SIGINT, task.cancel)
            loop.add_signal_handler(signal.SIGTERM, task.cancel)
        try:
            loop.run_until_complete(task)
        except* OSError as group:  # also one that a TaskGroup of the program has put into a group
            problem = group.exceptions[0]
    if problem:  # not inside except*, which would put SystemExit into a group
        raise SystemExit(str(problem))


if __name__ == "__main__":
    run(main())
