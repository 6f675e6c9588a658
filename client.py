"""Follow a stream of 0s and 1s over a WebSocket, and show the posterior of its probability of 1."""

import argparse
import asyncio
import dataclasses
import json
import logging
import math
import os
import random
import shutil
import signal
import sys
import threading
import time
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import HTTPRequest
from tornado.httputil import url_concat
from tornado.websocket import WebSocketClientConnection, websocket_connect

log = logging.getLogger("client")


@dataclasses.dataclass(frozen=True)
class BetaBinomial:
    """The posterior of a success probability: Beta(alpha, beta), from a flat prior."""

    successes: int = 0
    trials: int = 0

    @property
    def alpha(self) -> int:
        """The prior's 1, and the successes."""
        return 1 + self.successes

    @property
    def beta(self) -> int:
        """The prior's 1, and the failures."""
        return 1 + self.trials - self.successes

    @property
    def mean(self) -> float:
        """The expected success probability."""
        return self.alpha / (self.alpha + self.beta)

    @property
    def sd(self) -> float:
        """The standard deviation of the success probability."""
        return math.sqrt(self.mean * (1 - self.mean) / (self.alpha + self.beta + 1))

    def update(self, samples: list[int]) -> "BetaBinomial":
        """Return the posterior after these samples too; ValueError if one is not 0 or 1."""
        successes = samples.count(1)
        if successes + samples.count(0) != len(samples):
            raise ValueError("a sample is neither 0 nor 1")
        return BetaBinomial(self.successes + successes, self.trials + len(samples))

    def density(self, width: int) -> str:
        """Draw the density over 0..1 with so many block characters, scaled to its maximum."""
        grid = [(column + 0.5) / width for column in range(width)]
        failures = self.trials - self.successes
        logs = [self.successes * math.log(x) + failures * math.log(1 - x) for x in grid]
        top = max(logs)
        return "".join(" ▁▂▃▄▅▆▇█"[round(8 * math.exp(y - top))] for y in logs)

    def __str__(self) -> str:
        return f"Beta({self.alpha}, {self.beta})  mean {self.mean:.4f}  sd {self.sd:.4f}"


class WebSocketClient:
    """A position in the stream at a ws:// or wss:// URL, and the posterior of what has come so far.

    ValueError for a URL that can never work. `retry_delay`, in seconds, bounds the wait before
    the first retry; the bound doubles with every further one, up to 30 s.
    """

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        parts = urlsplit(url)
        possible = parts.scheme in ("ws", "wss") and parts.hostname and url.isprintable()
        if not possible or parts.port == 0:
            raise ValueError(f"not a WebSocket URL such as ws://localhost:8765/websocket: {url!r}")
        self.url = url
        self.retry_delay = retry_delay
        self.posterior = BetaBinomial()
        self.epoch: str | None = None  # which run of the stream, as its first message says
        self.position = 0  # the offset of the next sample
        self.missed = 0  # samples that had left the server's history before they could come
        self._attempt = 0  # failures since the last message
        self._thread: threading.Thread | None = None

    def on_message(self, samples: list[Any]) -> None:
        """Update the posterior; replace this method to do something else with the samples.

        Each sample comes once, in order, and the list is never empty. After a ValueError, or any
        other exception, these samples count as not received, and are asked for again: so change
        your own state last. It is called in the thread that listens, and cannot be a coroutine.
        """
        self.posterior = self.posterior.update(samples)

    def start(self) -> None:
        """Follow the stream in a background thread, until `stop`; a second start does nothing."""
        if self._thread is None or not self._thread.is_alive():
            loop = asyncio.new_event_loop()
            self._task = loop.create_task(self.run())
            self._thread = threading.Thread(target=self._listen, args=[loop], daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Close the connection, or give up trying, and wait until the thread has ended."""
        if self._thread is not None and self._thread.is_alive():
            self._stopping = True  # or what has been read already would still be taken
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)
            if self._thread is not threading.current_thread():  # on_message may call this
                self._thread.join()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # which closes the loop
            runner.run(asyncio.wait([self._task]))  # wait: it returns even if run is cancelled

    async def run(self) -> None:
        """Follow the stream in the event loop that is already there, until cancelled."""
        self._stopping = False
        while True:
            reason = await self._follow()
            # Exponential backoff with full jitter, or all clients would come back at once
            # (RFC 6455, section 7.2.3). Bounded twice, since 2 ** 1024 is too large for a float.
            wait = random.uniform(0, min(30, self.retry_delay * 2 ** min(self._attempt, 1000)))
            self._attempt += 1
            log.warning("%.300s; next try in %.1f s", reason, wait)
            await asyncio.sleep(wait)

    async def _follow(self) -> str:
        """Connect once, take messages until the connection is closed, and return the reason."""
        closed = asyncio.Event()
        problem = ""

        def close(handshake: asyncio.Future[WebSocketClientConnection]) -> None:
            if not handshake.exception():
                handshake.result().close(1000)

        def on_frame(frame: str | bytes | None) -> None:
            nonlocal problem
            if frame is None:  # Tornado's sign for the end of the connection
                closed.set()
            elif not problem and not self._stopping:
                try:
                    self._receive(frame)
                except (ValueError, RecursionError) as error:
                    problem = f"cannot understand {frame[:80]!r}: {error}"
                except Exception:
                    log.exception("on_message failed")
                    problem = "on_message failed"
                if problem:
                    close(handshake)

        query = {"epoch": self.epoch, "offset": str(self.position)} if self.epoch else {}
        # connect_timeout alone does not bound the handshake.
        request = HTTPRequest(url_concat(self.url, query), connect_timeout=10, request_timeout=10)
        handshake = asyncio.ensure_future(
            websocket_connect(
                request, on_message_callback=on_frame, ping_interval=10, ping_timeout=10
            )
        )
        try:
            connection = await asyncio.shield(handshake)
            log.info("connected to %s", request.url)
            await closed.wait()
            code, text = connection.close_code, connection.close_reason
            end = f"closed by the server: {code} {text!r}" if code else "connection lost"
            return problem or end
        except Exception as error:  # noqa: BLE001 - a stranger's answer can fail in any way
            return f"cannot connect: {str(error) or repr(error)}"
        finally:
            problem = "stopped"  # no message that still comes is taken
            # Tornado goes on with a handshake that nobody awaits any more: hence shield, and close.
            handshake.add_done_callback(close)
            await asyncio.wait([handshake], timeout=1)
            if handshake.done() and not handshake.exception():
                await closed.wait()  # Tornado gives the server 5 s to answer

    def _receive(self, frame: str | bytes) -> None:
        """Take one message, or raise ValueError and leave everything as it was."""
        message = json.loads(frame) if isinstance(frame, str) else None
        if not isinstance(message, dict):
            message = {}
        epoch, offset, samples = message.get("epoch"), message.get("offset"), message.get("samples")
        # An exact type, since True is an instance of int as well.
        if not (isinstance(epoch, str) and type(offset) is int and isinstance(samples, list)):
            raise ValueError("not a message of this protocol")
        # Only what a server will take in the URL, when the client comes back with it.
        if not (epoch.isascii() and len(epoch) <= 64 and 0 <= offset < 10**15 - len(samples)):
            raise ValueError("epoch or offset out of range")
        position = self.position
        if epoch != self.epoch:  # this is the first message, or the server was restarted
            position = offset if self.epoch is None else 0
        missed = max(0, offset - position)
        fresh = samples[max(0, position - offset) :]
        if fresh:
            self.on_message(fresh)
        # Only now: samples that on_message has refused are not counted, but asked for again.
        self.epoch = epoch
        self.position = max(position, offset + len(samples))
        self.missed += missed
        self._attempt = 0
        if missed:
            log.warning("missed %d samples, which had left the server's history", missed)


def main() -> None:
    """Show the posterior until Ctrl-C or SIGTERM."""
    # Without the usage line, an error is one line.
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument(
        "--url", default="ws://localhost:8765/websocket", help="default: %(default)s"
    )
    try:
        client = WebSocketClient(parser.parse_args().url)
    except ValueError as error:
        parser.error(f"--url: {error}")

    terminal = os.isatty(1) and sys.stdout.encoding == "utf-8"  # for the block characters
    # In a terminal, a line of log takes the place of the posterior, which goes on below it.
    erase, end = ("\r\033[K", "") if terminal else ("", "\n")
    erase_for_log = erase if os.isatty(2) else ""
    logging.basicConfig(format=f"{erase_for_log}%(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    # Tornado logs a traceback for a handshake that it cannot accept, where one line is enough.
    logging.getLogger("tornado.application").setLevel(logging.CRITICAL)

    def show(last: str) -> str:
        posterior = client.posterior  # once: the other thread may replace it at any time
        line = f"{posterior}  trials {posterior.trials}  missed {client.missed}"
        if terminal:
            width = shutil.get_terminal_size().columns - 3  # leaves room for a ^C
            room = min(40, width - len(line) - 4)
            line = f"{line}  |{posterior.density(room)}|" if room > 4 else line[:width]
        if terminal or line != last:  # in a terminal, a line of log may have erased it
            print(f"{erase}{line}", end=end, flush=True)
        return line

    stopping: list[int] = []  # an Event could wait for a lock that the interrupted thread holds
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, lambda number, frame: stopping.append(number))
    client.start()
    line = ""
    try:
        while not stopping:
            line = show(line)
            time.sleep(0.1)
        for number in signal.SIGINT, signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # a second one would kill Python as it exits
        client.stop()
        show(line)
        if terminal:
            print()
    except OSError as error:
        # Python flushes standard output again as it exits: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(error, BrokenPipeError):
            sys.exit(f"client.py: standard output: {error}")


if __name__ == "__main__":
    main()
