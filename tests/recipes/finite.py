"""A stream that ends: late clients get all of it, and every client knows that it has everything.

    python -m tests.recipes.finite server --below 10000
    python -m tests.recipes.finite client

You want it for a computation whose results are watched while it runs. Replace `compute`, and what
`on_message` does with a result. The last sample, such as {"results": 1229}, says how many there
are: a client that has so many prints a summary and ends by itself, with status 0. The server keeps
all results for those who come late. It ends when every connected client has everything. It waits
for the first one for an hour, or for --wait seconds. Ctrl-C ends either of the two earlier; the
status of the client is 1 then. It needs only Tornado.

Its limits: no result may be a dict with the key "results". All results stay in the server's memory.
A client "has" what was handed to the network. One that has lost its connection at the moment when
the others have everything finds no server when it comes back, and tries for ever. When the server
is started again, it computes everything again, and the client begins anew.
"""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from client import WebSocketClient, watch
from server import WebSocketServer, make_app, run, serve


async def compute(below: int) -> AsyncIterator[int]:
    """Give the primes below a number, one after the other: a stand-in for the computation."""
    for number in range(2, below):
        if all(number % divisor for divisor in range(2, math.isqrt(number) + 1)):
            yield number
            await asyncio.sleep(0.01)  # for a step that takes long: await asyncio.to_thread(step)


class Results(WebSocketServer):
    """A client of the results."""

    furthest = 0  # the highest position of those clients that have left

    def on_close(self) -> None:
        if self in self.clients:
            Results.furthest = max(Results.furthest, self.position)
        super().on_close()


async def all_have_it(wait: float) -> None:
    """Wait until every client has everything, and for a first client so many seconds at most."""
    deadline = time.monotonic() + wait
    await asyncio.sleep(0)  # what was sent is in the stream at the loop's next turn
    end = Results.stream.end
    while min((client.position for client in Results.clients), default=Results.furthest) < end:
        if not Results.clients and time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)


async def serve_results(below: int, wait: float, port: int) -> None:
    """Compute and serve, until all clients have everything."""
    app = make_app(Results)
    Results.stream.history_size = sys.maxsize  # keeps all
    Results.furthest = 0
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve(app, port))
        count = 0
        async for result in compute(below):
            Results.send_message([result])
            count += 1
        Results.send_message([{"results": count}])
        await all_have_it(wait)
        serving.cancel()


class Collector(WebSocketClient):
    """A client that keeps all results, and ends when it has them."""

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.results: list[int] = []
        self.results_of: str | None = None  # the epoch, which is another after a restart
        self.complete = False

    def on_message(self, samples: list[Any]) -> None:
        if self.epoch != self.results_of:
            self.results, self.results_of = [], self.epoch
        for sample in samples:
            match sample:
                case {"results": count}:
                    self.complete = len(self.results) == count
                    self.stop()
                case _:
                    self.results.append(sample)

    def __str__(self) -> str:
        extent = "complete" if self.complete else "so far"
        return f"{len(self.results)} primes {extent}, the last is {max(self.results, default=None)}"


def main() -> None:
    """Serve, or follow until the end, as the command line says."""
    parser = argparse.ArgumentParser(description="A computation that ends.")
    roles = parser.add_subparsers(dest="role", required=True)
    server, client = roles.add_parser("server"), roles.add_parser("client")
    server.add_argument("--below", type=int, default=10_000, help="(%(default)s)")
    server.add_argument("--wait", type=float, default=3600, help="seconds (%(default)s)")
    server.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    client.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    if options.role == "server":
        if not 0 <= options.port <= 65_535:
            parser.error("port must be from 0 to 65535")
        run(serve_results(options.below, options.wait, options.port))
        return
    try:
        collector = Collector(options.url)
    except ValueError as error:
        parser.error(str(error))
    watch(collector)
    sys.exit(0 if collector.complete else 1)


if __name__ == "__main__":
    main()
