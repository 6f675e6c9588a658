"""Follow a stream of 0s and 1s over a WebSocket, and show the posterior of its probability of 1."""

import argparse
import asyncio
import contextlib
import gc
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

from tornado import httpclient, httputil, websocket

log = logging.getLogger("client")


class BetaBinomial(NamedTuple):
    """The posterior of a success probability, Beta(alpha, beta); the prior is flat, Beta(1, 1)."""

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
        """Draw the density over 0..1 with `width` block characters, scaled to its maximum."""
        grid = [(column + 0.5) / width for column in range(width)]
        logs = [(self.alpha - 1) * math.log(x) + (self.beta - 1) * math.log(1 - x) for x in grid]
        return "".join(" ▁▂▃▄▅▆▇█"[round(8 * math.exp(y - max(logs)))] for y in logs)

    def __str__(self) -> str:
        return f"Beta({self.alpha}, {self.beta})  mean {self.mean:.4f}  sd {self.sd:.4f}"


class WebSocketClient:
    """A position in the stream at a ws:// or wss:// URL, and the posterior of what has come so far.

    `retry_delay`, in seconds, limits the wait for the first retry; each further one doubles the
    limit, up to 30 s. To go on from a saved state, set `posterior`, `epoch`, `position`, `missed`.
    """

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        parts = urlsplit(url)
        possible = parts.scheme in ("ws", "wss") and parts.hostname and parts.port != 0
        if not possible or "@" in parts.netloc or not url.isprintable():
            raise ValueError("the URL must be like ws://localhost:8765/websocket, without a user")
        if not retry_delay > 0:
            raise ValueError(f"retry_delay must be above 0, not {retry_delay}")
        self.url, self.retry_delay = url, retry_delay
        self.posterior = BetaBinomial()
        self.epoch: str | None = None  # which run of the server the position is in
        self.position = self.missed = 0  # the offset of the next sample; how many never came
        self._task: asyncio.Task[None] | None = None  # that of run; None once it is to end
        self._thread: threading.Thread | None = None

    def __str__(self) -> str:
        return f"▕{self.posterior.density(20)}▏ {self.posterior}  missed {self.missed}"

    def on_message(self, samples: list[Any]) -> Any:
        """Update the posterior. Replace this method to do something else with the samples.

        Each comes once and in order, first those of the history; the list is never empty. In here,
        `epoch` and `position` are those of its first; to save a position, add len(samples). After
        an exception the same come again, for ever: catch what may be wrong with a single one.
        Other threads read your state, so replace it, at the end. No `async def`, and no `yield`.
        """
        self.posterior = self.posterior.update(samples)

    def request(self, url: str) -> httpclient.HTTPRequest:
        """Return the request to connect with. Replace this method to add a header or `ca_certs`."""
        return httpclient.HTTPRequest(url, connect_timeout=10, request_timeout=10)

    def start(self) -> None:
        """Follow the stream in a thread of its own, until `stop`; a second start does nothing."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("the client's own thread cannot start it")
        if self._task is None or self._task.done():
            self.stop()  # the thread of an earlier start may still be ending
            # Without a factory, Runner would replace the caller's own event loop (a notebook's).
            runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
            task = self._task = runner.get_loop().create_task(self.run())
            self._thread = threading.Thread(target=self._work, args=[runner, task], daemon=True)
            self._thread.start()

    def _work(self, runner: asyncio.Runner, task: asyncio.Task[None]) -> None:
        with runner, contextlib.suppress(asyncio.CancelledError):
            runner.get_loop().run_until_complete(task)
        gc.collect()  # closes the socket that Tornado leaves open after a broken handshake

    def stop(self) -> None:
        """End `start` or `run`, and wait for the thread. In `on_message` it does not wait."""
        task, self._task = self._task, None
        if task and not task.done():
            task.get_loop().call_soon_threadsafe(task.cancel)
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    async def run(self) -> None:
        """Follow the stream in the caller's event loop; `stop` ends it with CancelledError."""
        self._task = asyncio.current_task()
        self._limit = self.retry_delay  # how long the next wait may be
        while True:
            reason = await self._follow()
            # Exponential backoff with full jitter (RFC 6455, 7.2.3): not all come back at once.
            wait = random.uniform(0, min(self._limit, 30))
            self._limit = 2 * min(self._limit, 30)
            log.warning("%s; next try in %.1f s", reason, wait)
            await asyncio.sleep(wait)

    async def _follow(self) -> str:
        """Connect once, take messages until the connection ends, and return the reason."""
        self._samples: list[Any] = []  # those that have come, and wait for on_message
        frames: asyncio.Queue[str | bytes | None] = asyncio.Queue()
        options: Any = {"on_message_callback": frames.put_nowait, "ping_interval": 10}
        query = {"epoch": self.epoch, "offset": str(self.position)} if self.epoch else {}
        try:
            request = self.request(httputil.url_concat(self.url, query))
            handshake: Any = asyncio.ensure_future(websocket.websocket_connect(request, **options))
            await asyncio.wait([handshake])
            connection = handshake.result()
        except asyncio.CancelledError:  # which does not end Tornado's handshake
            handshake.add_done_callback(lambda done: done.exception() or done.result().close(1000))
            raise
        except Exception as error:  # noqa: BLE001 - the text of another may hold a token
            known = (OSError, httpclient.HTTPClientError, websocket.WebSocketError)
            return f"cannot connect: {error if isinstance(error, known) else type(error).__name__}"
        log.info("connected to %s", self.url.partition("?")[0])
        frame: str | bytes | None = ""  # None once the connection has ended
        try:
            while (frame := await frames.get()) is not None:
                if not await self._receive(frame):
                    return f"cannot understand {frame[:80]!r}"
                if frames.empty():  # one call for all that has come
                    self._hand_over()
            if self._samples:  # or a server that hangs up at once would reset the wait
                self._hand_over()
        except Exception:
            log.exception("on_message failed")
            return "the same samples will come again"
        finally:
            connection.close(1000)
            while frame is not None:  # Tornado's sign for the end, at most 5 s later
                frame = await frames.get()
        code, text = connection.close_code, connection.close_reason
        return f"closed by the server: {code} {text!r}" if code else "connection lost"

    async def _receive(self, frame: str | bytes) -> bool:
        """Take one message apart, and gather what is new in it; tell whether it was understood."""
        try:
            message = json.loads(frame)
            epoch, offset, samples = message["epoch"], message["offset"], message["samples"]
            if [*map(type, (frame, epoch, offset, samples))] != [str, str, int, list] or offset < 0:
                return False
        except Exception:  # noqa: BLE001 - whatever is wrong with it, it is not of this protocol
            return False
        if self._samples and (epoch != self.epoch or offset > self.position + len(self._samples)):
            self._hand_over()  # what follows begins at another position
            await asyncio.sleep(0)  # a turn of the event loop, in which stop takes effect
        if self.epoch not in (None, epoch):
            log.warning("the server began anew; its last run was followed to %d", self.position)
        if epoch != self.epoch:  # at first nothing is missed; of a new run, all before its offset
            self.epoch, self.position = epoch, (offset if self.epoch is None else 0)
        expected = self.position + len(self._samples)
        if offset > expected:  # so nothing waits: it was handed over above
            log.warning("missed %d samples, which had left the history", offset - expected)
            self.missed += offset - expected
            self.position = offset
        self._samples += samples[max(0, expected - offset) :]  # those before were taken already
        return True

    def _hand_over(self) -> None:
        """Let on_message have what was gathered; then the position moves past it."""
        samples, self._samples = self._samples, []
        if samples:
            result = self.on_message(samples)
            if isinstance(result, (Awaitable, Generator, AsyncGenerator)):
                raise TypeError("on_message must be no coroutine and no generator")
            self.position += len(samples)
        self._limit = self.retry_delay  # a message was taken, so the next wait is short again


def _show(client: WebSocketClient) -> None:
    try:
        print(client, flush=True)
    except UnicodeEncodeError:  # this output has no block characters
        print(str(client).encode("ascii", "ignore").decode().strip(), flush=True)
    except OSError as error:
        sys.stdout = None  # or Python would write to it again as it exits
        sys.exit(None if isinstance(error, BrokenPipeError) else f"standard output: {error}")


def watch(client: WebSocketClient) -> None:
    """Print `str(client)` once a second while it follows the stream, until Ctrl-C or it ends."""
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # Tornado has a traceback for a handshake that it cannot accept, where one line is enough.
    logging.getLogger("tornado").setLevel(logging.CRITICAL)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, and another one while it stops
        try:
            client.start()
            while client._task and not client._task.done():
                _show(client)
                time.sleep(1)
        finally:
            logging.getLogger("tornado").setLevel(logging.NOTSET)
            client.stop()
            _show(client)


def main(client_type: type[WebSocketClient] = WebSocketClient) -> None:
    """Watch a client of the URL that the command line gives."""
    parser = argparse.ArgumentParser(description=__doc__, exit_on_error=False)
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    try:
        client = client_type(parser.parse_args().url)
    except (argparse.ArgumentError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    watch(client)


if __name__ == "__main__":
    main()
