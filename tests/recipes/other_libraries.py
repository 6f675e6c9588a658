"""Follow the stream with the libraries websockets or websocket-client, resuming after a drop.

You want it when your program speaks WebSocket already, and you do not want Tornado as well. It
needs nothing of client.py: copy it anywhere. Install one of the two, `pip install websockets` for
an event loop, or `pip install websocket-client` for a thread that may block, and run

    python -m tests.recipes.other_libraries websockets --url ws://localhost:8765/websocket
    python -m tests.recipes.other_libraries websocket-client --url ws://localhost:8765/websocket

or `python other_libraries.py websockets`. Ctrl-C ends it. `Position` is the client's rule for any
transport, in the standard library alone.

websockets closes the connection (1009) at a message of more than `max_size`, by default 1 MiB.
After a drop, 1,000 samples (the server's `message_size`) of 2 kB come in one message, and would
come again for ever. So it is set to 10 MiB here, as much as client.py takes. A sample that is not 0
or 1 is left out, and one line says so.

Its limit: `take` moves the position before your code has the samples. If your code fails then, end
the program, or they are never counted.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import time
from typing import Any
from urllib.parse import urlsplit

log = logging.getLogger("client")


class Position:
    """A position in one run of the stream, and the counts up to there."""

    def __init__(self) -> None:
        self.epoch, self.offset, self.missed = "", 0, 0
        self.ones, self.trials = 0, 0
        self.limit = 3.0  # seconds, of the wait for the next try

    def __str__(self) -> str:
        return f"ones {self.ones}  trials {self.trials}  missed {self.missed}"

    def query(self) -> str:
        """Return what the URL needs for the stream to go on from here."""
        return f"?epoch={self.epoch}&offset={self.offset}" if self.epoch else ""

    def take(self, frame: str | bytes) -> list[Any]:
        """Move past the message, and return those of its samples that are new."""
        try:
            message = json.loads(frame)
            epoch, offset, samples = message["epoch"], message["offset"], message["samples"]
            if [*map(type, (epoch, offset, samples))] != [str, int, list] or offset < 0:
                raise TypeError
        except (ValueError, LookupError, TypeError) as error:
            raise ConnectionAbortedError(f"cannot understand {frame[:80]!r}") from error
        if epoch != self.epoch:
            if self.epoch:
                log.warning("the server began anew; its last run was followed to %d", self.offset)
            self.epoch, self.offset = epoch, 0 if self.epoch else offset
        start, self.offset = self.offset, max(self.offset, offset + len(samples))
        if offset > start:
            log.warning("missed %d samples, which had left the history", offset - start)
            self.missed += offset - start
        self.limit = 3
        new: list[Any] = samples[max(0, start - offset) :]
        return new

    def count(self, frame: str | bytes) -> None:
        """Count the new samples of a message, and print the counts."""
        for sample in self.take(frame):
            if sample in (0, 1):
                self.ones, self.trials = self.ones + int(sample), self.trials + 1
            else:
                log.warning("not 0 or 1: %.80r", sample)
        print(self, flush=True)

    def wait(self, reason: object) -> float:
        """Say why a connection ended, and return how many seconds to wait for the next try."""
        seconds = random.uniform(0, self.limit)
        self.limit = min(2 * self.limit, 30)
        log.warning("%s; next try in %.1f s", reason, seconds)
        return seconds


async def follow_websockets(url: str, position: Position) -> None:
    """Follow the stream with websockets, until cancelled."""
    from websockets import ConnectionClosed, InvalidHandshake, connect

    options: dict[str, Any] = {"max_size": 10 * 2**20, "ping_interval": 10, "ping_timeout": 10}
    while True:
        reason: object = "closed by the server"
        try:
            async with connect(url + position.query(), **options) as connection:
                async for frame in connection:
                    position.count(frame)
        except (OSError, ConnectionClosed, InvalidHandshake) as error:
            reason = error
        await asyncio.sleep(position.wait(reason))


def follow_websocket_client(url: str, position: Position) -> None:
    """Follow the stream with websocket-client, for ever."""
    import websocket

    while True:
        reason: object = "closed by the server"
        try:
            # The server pings every 10 s, so 20 s of silence mean that the connection is lost.
            connection: Any = websocket.create_connection(url + position.query(), timeout=20)
            try:
                while frame := connection.recv():  # empty once the server has closed
                    position.count(frame)
            finally:
                connection.shutdown()  # close() does nothing once the server has closed
        except (OSError, websocket.WebSocketException) as error:
            reason = error
        time.sleep(position.wait(reason))


def main() -> None:
    """Follow the stream as the command line says, until Ctrl-C."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("library", choices=["websockets", "websocket-client"])
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    try:
        parts = urlsplit(options.url)
        possible = parts.scheme in ("ws", "wss") and parts.hostname and parts.port != 0
        if not possible or parts.query or "#" in options.url:
            raise ValueError("not a URL such as ws://localhost:8765/websocket, without a query")
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with contextlib.suppress(KeyboardInterrupt):
        if options.library == "websockets":
            asyncio.run(follow_websockets(options.url, Position()))
        else:
            follow_websocket_client(options.url, Position())


if __name__ == "__main__":
    main()
