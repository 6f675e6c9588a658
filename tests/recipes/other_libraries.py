"""Follow the stream with the libraries websockets or websocket-client, and go on after a drop.

You want it when your program speaks WebSocket already, and you do not want Tornado as well. It
needs nothing of client.py: copy it anywhere. Install one of the two, websockets for an event loop,
or websocket-client for a thread that may block, and run

    pip install websockets websocket-client
    python -m tests.recipes.other_libraries websockets --url ws://localhost:8765/websocket
    python -m tests.recipes.other_libraries websocket-client --url ws://localhost:8765/websocket

Ctrl-C ends it. `Position` is the client's rule for any transport, in the standard library alone. A
sample that is not 0 or 1 is left out, and one line says so.

websockets closes the connection at a message of more than `max_size`, 1 MiB by default, and a longer
sample would come again for ever. So it is 10 MiB here, as much as client.py takes.

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
from urllib.parse import urlencode, urlsplit

logger = logging.getLogger("client")


class Position:
    """A position in one run of the stream, and the counts up to there."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.epoch: str | None = None
        self.offset = 0  # of the next sample
        self.missed = 0
        self.ones = 0
        self.trials = 0
        self.limit = 3.0  # seconds, of the wait for the next try

    def __str__(self) -> str:
        return f"ones {self.ones}  trials {self.trials}  missed {self.missed}"

    def next_url(self) -> str:
        """Return the URL to go on from here; an epoch may have any characters."""
        if self.epoch is None:
            return self.url
        return f"{self.url}?{urlencode({'epoch': self.epoch, 'offset': self.offset})}"

    def take(self, message: str | bytes) -> list[Any]:
        """Move past the message, and return those of its samples that are new."""
        try:
            fields = json.loads(message)
            epoch, offset, samples = fields["epoch"], fields["offset"], fields["samples"]
            if (type(epoch), type(offset), type(samples)) != (str, int, list) or offset < 0:
                raise ValueError("not a message of this protocol")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ConnectionAbortedError(f"cannot understand {message[:80]!r}") from error
        if self.epoch is None:  # what came before the first message is not missed
            self.offset = offset
        elif epoch != self.epoch:
            logger.warning("the stream began anew; the last run was followed to %d", self.offset)
            self.offset = 0
        self.epoch = epoch
        if offset > self.offset:
            logger.warning("missed %d samples", offset - self.offset)
            self.missed += offset - self.offset
            self.offset = offset
        new: list[Any] = samples[self.offset - offset :]  # those before were taken already
        self.offset += len(new)
        if new:
            self.limit = 3
        return new

    def count(self, message: str | bytes) -> None:
        """Count the new samples of a message, and print the counts."""
        for sample in self.take(message):
            if sample in (0, 1):
                self.ones, self.trials = self.ones + int(sample), self.trials + 1
            else:
                logger.warning("not 0 or 1: %.80r", sample)
        print(self, flush=True)

    def wait(self, reason: object) -> float:
        """Say why a connection ended, and return how many seconds to wait for the next try."""
        seconds = random.uniform(0, self.limit)
        self.limit = min(2 * self.limit, 30)
        logger.warning("%s; next try in %.1f s", reason, seconds)
        return seconds


async def follow_websockets(position: Position) -> None:
    """Follow the stream with websockets, until cancelled."""
    from websockets import ConnectionClosed, InvalidHandshake, connect

    options: dict[str, Any] = {"max_size": 10 * 2**20, "ping_interval": 10, "ping_timeout": 10}
    while True:
        reason: object = "closed by server"
        try:
            async with connect(position.next_url(), **options) as connection:
                async for message in connection:
                    position.count(message)
        except (OSError, ConnectionClosed, InvalidHandshake) as error:
            reason = error
        await asyncio.sleep(position.wait(reason))


def follow_websocket_client(position: Position) -> None:
    """Follow the stream with websocket-client, for ever."""
    import websocket

    while True:
        reason: object = "closed by server"
        try:
            # The server pings every 10 s, so 20 s of silence mean that the connection is lost.
            connection: Any = websocket.create_connection(position.next_url(), timeout=20)
            try:
                while message := connection.recv():  # empty once the server has closed
                    position.count(message)
            finally:
                connection.shutdown()  # close() does nothing once the server has closed
        except (OSError, websocket.WebSocketException) as error:
            reason = error
        time.sleep(position.wait(reason))


def main() -> None:
    """Follow the stream as the command line says, until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Follow a stream with another library.")
    parser.add_argument("library", choices=["websockets", "websocket-client"])
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    try:
        parts = urlsplit(options.url)
        possible = parts.scheme in ("ws", "wss") and parts.hostname and parts.port != 0
        if not possible or parts.query or "#" in options.url:
            raise ValueError("the URL must be like ws://HOST:PORT/websocket, without a query")
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    position = Position(options.url)
    with contextlib.suppress(KeyboardInterrupt):
        try:
            if options.library == "websockets":
                asyncio.run(follow_websockets(position))
            else:
                follow_websocket_client(position)
        except ImportError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
