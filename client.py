"""Follow a stream of 0s and 1s over a WebSocket, and show the posterior of the probability of 1."""

import argparse
import asyncio
import contextlib
import json
import logging
import math
import random
import sys
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Generator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.httputil import url_concat
from tornado.websocket import WebSocketClientConnection, WebSocketError, websocket_connect

logger = logging.getLogger("client")
Messages = asyncio.Queue[str | bytes | None]  # a type alias; None is the end of a connection


class BetaBinomial(NamedTuple):
    """The Beta posterior of a probability of 1 after counts of 1 and 0. The prior is Beta(1, 1)."""

    alpha: float = 1
    beta: float = 1

    @property
    def mean(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    @property
    def sd(self) -> float:
        return math.sqrt(self.mean * (1 - self.mean) / (self.alpha + self.beta + 1))

    def update(self, samples: list[Any]) -> "BetaBinomial":
        """Return the posterior after these samples too; ValueError if one is not 0 or 1."""
        ones, zeros = samples.count(1), samples.count(0)
        if ones + zeros < len(samples):
            raise ValueError(f"samples must be 0 or 1, not {samples!r:.80}")
        return BetaBinomial(self.alpha + ones, self.beta + zeros)

    def density(self, width: int) -> str:
        """Draw the density over 0..1 with `width` block characters, scaled to the highest one."""
        xs = [(column + 0.5) / width for column in range(width)]
        log_density = [
            (self.alpha - 1) * math.log(x) + (self.beta - 1) * math.log(1 - x) for x in xs
        ]
        highest = max(log_density)
        return "".join(" ▁▂▃▄▅▆▇█"[round(8 * math.exp(y - highest))] for y in log_density)

    def __str__(self) -> str:
        return f"Beta({self.alpha}, {self.beta})  mean {self.mean:.4f}  sd {self.sd:.4f}"


def parse(message: str | bytes) -> tuple[str, int, list[Any]]:
    """Return epoch, offset and samples of a message like those in server.py, or raise an error."""
    fields = json.loads(message)
    epoch, offset, samples = fields["epoch"], fields["offset"], fields["samples"]
    types = type(message), type(epoch), type(offset), type(samples)
    if types != (str, str, int, list) or offset < 0:
        raise ValueError("not a message of this protocol")
    return epoch, offset, samples


class WebSocketClient:
    """Follows the stream at a ws:// or wss:// URL, and keeps the posterior of what has come so far.

    After a failure it waits up to `retry_delay` seconds, then up to twice as long each time, up to
    30 s. To go on from a saved state, set `epoch`, `position`, `missed` and `posterior`.
    """

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        parts = urlsplit(url)
        possible = url.startswith(("ws://", "wss://")) and parts.hostname and parts.port != 0
        # An @ would mean a user and a password, which logs would show.
        if not possible or "@" in parts.netloc or not retry_delay > 0:
            raise ValueError("the URL must be like ws://HOST:PORT/websocket, retry_delay above 0")
        self.url = url
        self.retry_delay = retry_delay
        self.posterior = BetaBinomial()
        self.epoch: str | None = None  # which run of the stream the position belongs to
        self.position = 0  # the number of the next sample
        self.missed = 0  # samples that had left the server's history before they could come
        self.connected = False  # so that a display can mark old numbers
        self.thread: threading.Thread | None = None  # made by `start`
        self._follower: asyncio.Task[None] | None = None  # the task of `start` or `run`

    def __str__(self) -> str:
        return f"▕{self.posterior.density(20)}▏ {self.posterior}  missed {self.missed}"

    def on_message(self, samples: list[Any]) -> Awaitable[None] | None:
        """Update the posterior with the next samples. Replace this; it may be `async def`.

        `epoch`, `position` and `missed` already say where the stream goes on after them: save these
        together with your own state. After an exception the same samples come again and again: so
        handle a bad sample in here, and change your state last. To take only the first n, subtract
        len(samples) - n from `position`, call `stop`, and await nothing after that. While an
        `async def` awaits, messages gather in memory; `stop` ends it as an exception does.
        """
        self.posterior = self.posterior.update(samples)
        return None

    def request(self, url: str) -> HTTPRequest:
        """Return the request to connect with. Replace this to add a header or `ca_certs`."""
        return HTTPRequest(url, connect_timeout=10, request_timeout=10)

    async def run(self) -> None:
        """Follow the stream in the running event loop, until `stop`."""
        self._refuse_a_second()
        self.thread = None
        # When `stop` cancels the task, `await task` would raise CancelledError; a group just ends.
        async with asyncio.TaskGroup() as group:
            self._follower = group.create_task(self._follow())

    def start(self) -> None:
        """Follow the stream in a thread of its own, until `stop`; `on_message` runs in there."""
        self._refuse_a_second()
        # Without the factory, the runner would replace the event loop of the calling thread.
        runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        task = runner.get_loop().create_task(self._follow())
        self._follower = task  # before the thread begins, so that `stop` always finds it

        def in_thread() -> None:
            with runner, contextlib.suppress(asyncio.CancelledError):
                runner.get_loop().run_until_complete(task)

        self.thread = threading.Thread(target=in_thread, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """End what `run` or `start` has begun. Any thread may call this, and so may `on_message`.

        After `start` it waits, except in `on_message`. A SystemExit of on_message comes out here.
        """
        follower = self._follower
        if follower:
            with contextlib.suppress(RuntimeError):  # its event loop may be closed
                follower.get_loop().call_soon_threadsafe(follower.cancel)
            if self.thread and self.thread is not threading.current_thread():
                while self.thread.is_alive() and not follower.done():
                    self.thread.join(0.01)  # not join(): it may still wait for a name server
                if follower.done() and not follower.cancelled():
                    follower.result()

    def _refuse_a_second(self) -> None:
        if self._follower is not None and not self._follower.done():
            raise RuntimeError("this client follows the stream already")

    async def _follow(self) -> None:
        """Connect, listen, wait, and try again: exponential backoff with full jitter."""
        limit = self.retry_delay
        while True:
            before = self.epoch, self.position
            try:
                reason = await self._listen()
            except (Exception, asyncio.CancelledError):
                if (task := asyncio.current_task()) and task.cancelling():
                    raise  # by `stop`; another CancelledError is a failure of on_message
                logger.exception("an error in on_message or request")
                reason = "the same samples will come again"
            if (self.epoch, self.position) != before:
                limit = self.retry_delay
            wait = random.uniform(0, min(limit, 30))  # or all come back at once (RFC 6455, 7.2.3)
            limit = min(2 * limit, 30)
            logger.warning("%s; next try in %.1f s", reason, wait)
            await asyncio.sleep(wait)

    async def _listen(self) -> str:
        """Connect, take messages until the connection ends, and return why it has ended."""
        arrived: Messages = asyncio.Queue()
        try:
            url = self.url
            if self.epoch is not None:
                url = url_concat(url, {"epoch": self.epoch, "offset": str(self.position)})
            connection = await connect(self.request(url), arrived)
        except (OSError, UnicodeError, HTTPClientError, WebSocketError) as error:
            return f"cannot connect: {error}"
        logger.info("connected to %s", self.url.partition("?")[0])
        self.connected = True
        try:
            return await self._take_messages(connection, arrived)
        finally:
            self.connected = False
            connection.close(1000)
            while await arrived.get() is not None:  # which comes when it is closed, within 5 s
                pass

    async def _take_messages(self, connection: WebSocketClientConnection, arrived: Messages) -> str:
        """Take messages until the connection ends or one of them is wrong; return what happened."""
        pending: list[Any] = []  # they begin at `position`, and are handed over together
        while True:
            if arrived.empty():  # one call for all that came while on_message was busy
                await self._hand_over(pending)
                pending = []
            message = await arrived.get()
            if message is None:
                arrived.put_nowait(None)  # put it back: `_listen` waits for it
                reason = "connection lost"
                if connection.close_code:
                    reason = f"closed with {connection.close_code} {connection.close_reason!r}"
                break
            try:
                epoch, offset, samples = parse(message)
            except (ValueError, KeyError, TypeError, RecursionError):
                reason = f"cannot understand {message[:80]!r}"
                break
            if epoch != self.epoch or offset > self.position + len(pending):
                await self._hand_over(pending)
                pending = []
                self._move(epoch, offset)
            pending += samples[self.position + len(pending) - offset :]  # skip what was taken
        await self._hand_over(pending)
        return reason

    def _move(self, epoch: str, offset: int) -> None:
        """Move to the first message, to a new run of the stream, or over a gap."""
        if self.epoch is None:  # what came before a client's first message is not missed
            self.position = offset
        elif epoch != self.epoch:
            logger.warning("the stream began anew; the last run was followed to %d", self.position)
            self.position = 0
        self.epoch = epoch
        if offset > self.position:
            logger.warning("missed %d samples", offset - self.position)
            self.missed += offset - self.position
            self.position = offset

    async def _hand_over(self, samples: list[Any]) -> None:
        """Move the position and call on_message; if it fails, move the position back."""
        if not samples:
            return
        first = self.position
        self.position += len(samples)
        try:
            result: Any = self.on_message(samples)
            if isinstance(result, (Generator, AsyncGenerator)):
                raise TypeError("on_message must not contain a yield")
            if isinstance(result, Awaitable):
                await result
        except BaseException:
            self.position = first
            raise
        await asyncio.sleep(0)  # if `stop` was called, this is where the task is cancelled


async def connect(request: HTTPRequest, arrived: Messages) -> WebSocketClientConnection:
    """Connect. Tornado then puts each message into the queue, and None when the connection ends."""
    attempt = websocket_connect(request, on_message_callback=arrived.put_nowait, ping_interval=10)
    handshake = asyncio.ensure_future(attempt)
    try:
        return await asyncio.shield(handshake)
    except asyncio.CancelledError:  # Tornado goes on connecting: close what comes of it
        handshake.add_done_callback(close_late)
        raise


def close_late(handshake: asyncio.Future[WebSocketClientConnection]) -> None:
    """Close a connection that nobody waits for any more."""
    if not handshake.cancelled() and handshake.exception() is None:
        handshake.result().close(1000)


def show(client: WebSocketClient) -> None:
    """Print a client; end the program if that is impossible."""
    try:
        print(client, flush=True)
    except (OSError, UnicodeEncodeError) as error:
        sys.stdout = None  # or Python would write to it again as it exits
        if isinstance(error, BrokenPipeError):  # as in `client.py | head`
            sys.exit()
        sys.exit(f"cannot print: {error}")


def watch(client: WebSocketClient) -> None:
    """Start a client, and print it once a second until it ends, or until Ctrl-C."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with contextlib.suppress(KeyboardInterrupt):
        try:
            client.start()  # inside `try`, or a Ctrl-C in the first moment would show nothing
            while client.thread and client.thread.is_alive():
                show(client)
                time.sleep(1)
        finally:
            client.stop()
            show(client)


def main(client_type: type[WebSocketClient] = WebSocketClient) -> None:
    """Watch a client of the URL on the command line. In a notebook, call its `start` instead."""
    parser = argparse.ArgumentParser(description="Follow a stream, and show its posterior.")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    try:
        client = client_type(parser.parse_args().url)
    except ValueError as error:
        parser.error(str(error))
    logging.getLogger("tornado").setLevel(logging.CRITICAL)  # it logs tracebacks of bad handshakes
    watch(client)


if __name__ == "__main__":
    main()
