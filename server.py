"""Stream samples of a Bernoulli variable over WebSockets to every client that is connected."""

import argparse
import asyncio
import functools
import gc
import json
import logging
import os
import random
import secrets
import signal
import sys
from typing import Any, ClassVar

from tornado.httpserver import HTTPServer
from tornado.ioloop import PeriodicCallback
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketClosedError, WebSocketHandler

log = logging.getLogger("server")


class RandomBernoulli:
    """A coin that shows 1 with probability p, and 0 otherwise; ValueError unless 0 <= p <= 1."""

    def __init__(self, p: float) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be from 0 to 1, not {p}")
        self.p = p

    def sample(self) -> int:
        """Toss once."""
        return int(random.random() < self.p)


class WebSocketServer(WebSocketHandler):
    """One client: a position in the numbered log of samples, which all clients share.

    A second stream is a subclass with clients, history, epoch and end of its own.
    """

    clients: ClassVar[set["WebSocketServer"]] = set()
    max_clients = 1_000  # below the 1,024 files that Linux lets a process open
    epoch = secrets.token_hex(4)  # which run of the stream the offsets belong to
    end = 0  # the offset of the next sample, that is, how many there have been
    history: ClassVar[list[Any]] = []  # the newest samples, those before the end
    history_size = 10_000  # at least 1

    position = 0  # the offset of the next sample that this client needs
    writing = False  # whether its last write is unfinished

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        """Append the samples to the log, and bring every client that is ready up to date.

        A sample is whatever JSON can hold, and must not be changed any more; at anything else
        TypeError or ValueError is raised, and the log stays as it was. Call it in the event
        loop's own thread.
        """
        json.dumps(samples, allow_nan=False)  # a bad sample fails here, before it is in the log
        cls.history += samples
        del cls.history[: -cls.history_size]
        cls.end += len(samples)
        for client in cls.clients:
            if client.position < cls.end and not client.writing:
                client.catch_up()

    @classmethod
    @functools.lru_cache(maxsize=8)  # most clients need the same message: encode it once
    def message(cls, position: int, end: int) -> bytes:
        """Encode what a client at this position lacks, as far as the history still has it."""
        oldest = end - len(cls.history)
        offset = max(position, oldest)
        message = {"epoch": cls.epoch, "offset": offset, "samples": cls.history[offset - oldest :]}
        return json.dumps(message).encode()

    def prepare(self) -> None:
        """Find the position that the URL asks for, or refuse the connection with a reason."""
        if len(self.clients) >= self.max_clients:
            raise HTTPError(503, reason="too many clients")
        query = self.request.query_arguments
        if ("epoch" in query) != ("offset" in query):
            raise HTTPError(400, reason="epoch and offset go together")
        if "offset" in query:
            epoch, offset = query["epoch"][-1], query["offset"][-1]
            if not offset.isdigit() or len(offset) > 15:  # bytes: only ASCII digits are digits
                raise HTTPError(400, reason="offset must be 1 to 15 digits")
            if epoch == self.epoch.encode():
                self.position = int(offset)
        if self.position > self.end:
            raise HTTPError(400, reason=f"offset is beyond the end, which is {self.end}")

    def open(self) -> None:
        """Welcome a client with the first message, which tells it where it stands."""
        self.clients.add(self)
        log.info("client %s connected, %d in all", self.request.remote_ip, len(self.clients))
        self.set_nodelay(True)  # or small messages wait for the acknowledgement of earlier ones
        self.catch_up()

    def catch_up(self) -> None:
        """Send all that this client lacks, as one message.

        Until it is written the client is passed over. So a slow client has one unfinished write
        instead of a queue that grows, and gets fewer, larger messages.
        """
        self.writing = True  # and stays so if the message cannot be written: on_close follows
        try:
            write = self.write_message(self.message(self.position, self.end))
        except WebSocketClosedError:
            pass  # it is closing already
        except Exception as error:  # noqa: BLE001 - whatever is wrong, it costs the others nothing
            log.error("client %s dropped: %r", self.request.remote_ip, error)
            self.close()
        else:
            self.position = self.end
            write.add_done_callback(self.written)

    def written(self, write: asyncio.Future[None]) -> None:
        """Go on with what has come while the last message was being written."""
        self.writing = False
        # exception() marks a failure as seen, or asyncio would log a traceback for it.
        failed = write.cancelled() or write.exception()
        if not failed and self.position < self.end:
            self.catch_up()

    def on_message(self, message: str | bytes) -> None:
        """Close the connection: this stream is read-only."""
        self.close(1008, "this stream is read-only")

    def on_close(self) -> None:
        """Forget this client."""
        self.clients.discard(self)
        log.info("client %s closed, %d in all", self.request.remote_ip, len(self.clients))


def make_app(handler: type[WebSocketServer] = WebSocketServer) -> Application:
    """Make the application that serves the stream at /websocket."""
    return Application(
        [(r"/websocket/?", handler)],
        websocket_ping_interval=10,  # seconds
        websocket_ping_timeout=10,  # seconds
        websocket_max_message_size=1024,  # bytes, from a client
    )


async def main() -> None:
    """Sample and serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage=argparse.SUPPRESS,  # an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--address", default="localhost", help="to listen on")
    parser.add_argument("--port", type=int, default=8765, help="to listen on; 0 takes a free one")
    parser.add_argument("--p", type=float, default=0.72, help="probability of a 1")
    parser.add_argument("--interval", type=int, default=100, help="milliseconds between messages")
    parser.add_argument("--batch", type=int, default=1, help="samples per message")
    options = parser.parse_args()
    for name, low, high in (
        ("p", 0, 1),
        ("port", 0, 65_535),
        ("interval", 1, 86_400_000),
        ("batch", 1, WebSocketServer.history_size),
    ):
        if not low <= getattr(options, name) <= high:
            parser.error(f"--{name} must be from {low} to {high}, not {getattr(options, name)}")
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)

    # A message to thousands of clients makes thousands of objects: look for garbage less often.
    gc.set_threshold(50_000)
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in signal.SIGINT, signal.SIGTERM:
        # A signal comes at any point of the code, so it only wakes the loop.
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop.set))

    server = HTTPServer(make_app(), idle_connection_timeout=10, body_timeout=10, max_body_size=1024)
    try:
        sockets = bind_sockets(options.port, options.address)
        server.add_sockets(sockets)
        host = f"[{options.address}]" if ":" in options.address else options.address
        print(f"ws://{host}:{sockets[0].getsockname()[1]}/websocket", flush=True)
    except (OSError, UnicodeError) as error:
        # Python flushes standard output again as it exits: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(f"server.py: {options.address}:{options.port}: {error}")

    coin = RandomBernoulli(options.p)
    sampling = PeriodicCallback(
        lambda: WebSocketServer.send_message([coin.sample() for _ in range(options.batch)]),
        options.interval,
    )
    sampling.start()

    await stop.wait()
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)  # a second one would find the loop closed

    sampling.stop()
    server.stop()
    await asyncio.sleep(0.1)  # in which the last samples follow writes that are nearly finished
    deadline = loop.time() + 5
    while WebSocketServer.clients and loop.time() < deadline:
        for client in list(WebSocketServer.clients):
            client.close(1001, "going away")
        await asyncio.sleep(0.01)


if __name__ == "__main__":
    asyncio.run(main())
