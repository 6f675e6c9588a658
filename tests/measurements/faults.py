"""Print what becomes of each sample in the large faults, with the pair and with the plain loop.

Run it in the folder of the scripts, about four minutes: python -m tests.measurements.faults
"""

import asyncio
import contextlib
import json
import logging
import random
import signal
import sys
from collections.abc import Awaitable
from typing import Any

from tornado.websocket import WebSocketClosedError, websocket_connect

from server import WebSocketServer
from tests.faults import raw_client, request
from tests.scenarios import OURS, Count, Pair, never_reading, restarts, scene, storm
from tests.support import SEED, Recorder, following, until


class PlainServer(WebSocketServer):
    """The plain loop: write to one client after the other, and keep nothing."""

    @classmethod
    def send_message(cls, samples: list[Any]) -> None:
        message = json.dumps(samples)
        with contextlib.suppress(WebSocketClosedError):  # it ends the loop, and that is all
            for client in cls.clients:
                client.write_message(message)

    async def feed(self) -> None:
        pass


class PlainClient(Recorder):
    """Reads until the connection ends, and connects again."""

    async def run(self) -> None:
        self.reading = asyncio.create_task(self.read())
        with contextlib.suppress(asyncio.CancelledError):
            await self.reading

    def stop(self) -> None:
        self.reading.cancel()

    async def read(self) -> None:
        """Keep the samples of one connection after the other."""
        while True:
            with contextlib.suppress(Exception):  # as such clients do
                connection = await websocket_connect(self.url)
                self.epoch, self.connected = "unknown", True
                with contextlib.closing(connection):
                    while (message := await connection.read_message()) is not None:
                        self.samples += json.loads(message)
            self.connected = False
            await asyncio.sleep(0.005)


async def vanishing(pair: Pair) -> Count:
    """Let a peer vanish beside ten clients; it is dropped 5 s after it has missed a ping."""
    async with scene(pair) as here, raw_client(here.url, request()) as peer:
        followers = [pair.client(here.url) for _ in range(9)]
        dropped = asyncio.ensure_future(peer.read_until_close())
        async with following(*followers):
            await until(lambda: len(here.handler.clients) == 11)
            with here.flowing():
                await dropped
            return await here.count(*followers)


async def crowd(pair: Pair) -> Count:
    """Let 500 clients come at once, 10,000 numbers late."""
    async with scene(pair) as here:
        here.send(10_000)
        followers = [pair.client(here.url) for _ in range(500)]
        async with following(*followers):
            await until(lambda: len(here.handler.clients) == 501)
            return await here.count(*followers)


async def row(name: str, ours: Awaitable[Count], plain: Awaitable[Count]) -> None:
    """Measure the pair and the plain loop, and print a line of the table."""
    count, other = await ours, await plain
    said = ", all said" if count.lost and not count.unsaid else ""
    print(
        f"| {name} | {count.wanted:,} | {count.lost:,}{said} | {count.doubled:,}"
        f" | {other.lost:,} of {other.wanted:,} | {other.doubled:,} |",
        flush=True,
    )


async def measure() -> None:
    """Print the table."""
    random.seed(SEED)
    plain = Pair(PlainServer, PlainClient)
    print("| fault | samples | lost | doubled | plain loop: lost | doubled |")
    print("|---|--:|--:|--:|--:|--:|")
    name = "20 clients behind proxies that reset, close, cut, stall and trickle"
    await row(name, storm(OURS), storm(plain))
    name = "the same with a history of only 50 samples"
    await row(name, storm(OURS, history_size=50), storm(plain, history_size=50))
    await row("a peer that vanishes, beside ten clients", vanishing(OURS), vanishing(plain))
    ends = 5 * [signal.SIGTERM, signal.SIGKILL]
    name = "5 clients, the server restarted ten times"
    await row(name, restarts(OURS, *ends), restarts(plain, *ends))
    await row("500 clients at once, 10,000 samples late", crowd(OURS), crowd(plain))
    (_, ours), (_, other) = await never_reading(OURS), await never_reading(plain)
    print("\nTen peers that never read 20,000 samples/s: in 30 s, the server grows by")
    print(f"{ours:.1f} MB, that of the plain loop by {other:.0f} MB.")
    print(f"\nSEED={SEED}", file=sys.stderr)


if __name__ == "__main__":
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("server").setLevel(logging.INFO)  # which names the URL
    PlainServer.__module__ = "tests.measurements.faults"  # where another process finds it
    asyncio.run(measure())
