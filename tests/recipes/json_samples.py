"""Any JSON as a sample: text, lists, objects. Here both ends of the stream are in one process.

    python -m tests.recipes.json_samples

Replace `measure`, and `read`, which is its opposite. A sample that `read` does not understand is
refused: it is counted, and one line says so. Ctrl-C ends both ends. It needs only Tornado.

What JSON does to a sample:

- A date or a time is refused with a TypeError: send `time.isoformat()`, and read it with
  `datetime.fromisoformat`.
- A Decimal is refused: send `str(price)` where it must be exact, or else `float(price)`.
- NaN and infinity are refused with a ValueError: send None.
- What NumPy makes is refused, except a float64: send `x.tolist()`, which does for an array, too.
- A tuple arrives as a list. A key of a dict arrives as text: {1: 2} as {"1": 2}.
- None, True, False, text, and numbers of Python arrive as they were.

`send_message` refuses a whole list for one such sample, in the thread that calls it. Its limit: a
sample may have 10 million bytes as JSON.
"""

import argparse
import asyncio
import logging
import random
from datetime import UTC, datetime
from typing import Any, NamedTuple

from client import WebSocketClient
from server import WebSocketServer, make_app, run, serve

logger = logging.getLogger("model")


class Reading(NamedTuple):
    """What a thermometer says."""

    place: str
    time: datetime
    celsius: float


def measure() -> dict[str, Any]:
    """Return a sample; this is a stand-in for the source."""
    place, time = random.choice(["cellar", "roof"]), datetime.now(UTC)
    return {"place": place, "time": time.isoformat(), "celsius": random.gauss(15, 5)}


def read(sample: Any) -> Reading:
    """Return what a sample says; ValueError if that cannot be understood."""
    match sample:
        case {"place": str(place), "time": str(time), "celsius": int() | float() as celsius}:
            return Reading(place, datetime.fromisoformat(time), celsius)
    raise ValueError("not a reading")


class Thermometers(WebSocketClient):
    """A client that keeps the newest reading."""

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.newest: Reading | None = None
        self.refused = 0

    def on_message(self, samples: list[Any]) -> None:
        for sample in samples:
            try:
                self.newest = read(sample)
            except ValueError as error:
                self.refused += 1
                logger.warning("refused %.80r: %s", sample, error)

    def __str__(self) -> str:
        return f"{self.newest}  missed {self.missed}  refused {self.refused}"


async def play(client: Thermometers) -> None:
    """Send a reading a second, and print what the client has of it."""
    while True:
        WebSocketServer.send_message([measure()])
        await asyncio.sleep(1)
        print(client, flush=True)


async def main() -> None:
    """Serve and follow a stream, until cancelled."""
    parser = argparse.ArgumentParser(description="Stream readings, and follow them.")
    parser.add_argument("--port", type=int, default=8765, help="(%(default)s)")
    options = parser.parse_args()
    try:
        client = Thermometers(f"ws://localhost:{options.port}/websocket")
    except ValueError:
        parser.error("port must be from 1 to 65535")
    app = make_app()
    async with asyncio.TaskGroup() as group:
        group.create_task(client.run())
        group.create_task(play(client))
        await serve(app, options.port)


if __name__ == "__main__":
    run(main())
