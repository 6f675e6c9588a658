"""The stream as an iterator: `for sample in client` in a script, `async for` in a coroutine.

You want it when your program asks for samples, and does not want to be called with them. This takes
exactly 1,000 samples, and goes on later with the next one:

    client = Samples("ws://localhost:8765/websocket")
    first = list(itertools.islice(client, 1000))
    for sample in client:
        if sample == 0:
            break

This does the same, in a script or in an event loop:

    python -m tests.recipes.iterator script --count 1000
    python -m tests.recipes.iterator asyncio --count 1000

You may leave a loop at any moment, also with an exception: then the connection is closed, and no
thread stays behind. What has come, but was not taken, waits for the next loop, which connects again
when it has taken that. Ctrl-C ends the program. It needs only Tornado.

Its limits: one loop at a time. What leaves the server's history between two loops is missed, and
counted in `missed`. What comes while your loop is busy gathers in memory. `epoch`, `position` and
`missed` tell what has come, not what your loop has taken.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

from client import WebSocketClient


class Samples(WebSocketClient):
    """A client to loop over, with `for` or with `async for`."""

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.arrived: deque[Any] = deque()  # what no loop has taken yet
        self.changed: threading.Event | asyncio.Event = threading.Event()
        self.following: asyncio.Task[None] | None = None  # the task of `async for`

    def on_message(self, samples: list[Any]) -> None:
        self.arrived.extend(samples)  # never waits for the loop, which may be left by now
        self.changed.set()

    def __iter__(self) -> Iterator[Any]:
        while self.arrived:  # a loop that takes only these needs no connection
            yield self.arrived.popleft()
        changed = self.changed = threading.Event()
        self.start()
        try:
            while self.thread and self.thread.is_alive():
                changed.clear()
                while self.arrived:
                    yield self.arrived.popleft()
                changed.wait(1)
        finally:
            if not sys.is_finalizing():  # or `stop` would wait for a thread that runs no more
                self.stop()

    async def __aiter__(self) -> AsyncIterator[Any]:
        if self.following:  # after `break`, the event loop ends the last loop a moment later
            await end(self.following)
        while self.arrived:
            yield self.arrived.popleft()
        changed = self.changed = asyncio.Event()
        following = self.following = asyncio.create_task(self.run())
        following.add_done_callback(lambda _: changed.set())
        try:
            while not following.done():
                changed.clear()
                while self.arrived:
                    yield self.arrived.popleft()
                await changed.wait()
            following.result()  # raises what has ended it, other than `stop`
        finally:
            await end(following)


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task, and wait for its end."""
    if not task.done():
        task.cancel()  # not `stop`, which does nothing before the task has begun
        await asyncio.wait([task])


def script(client: Samples, count: int) -> None:
    """Take so many samples, and later one more."""
    first = list(itertools.islice(client, count))
    print(f"{len(first)} samples, the last is {first[-1]!r}", flush=True)
    for sample in client:
        print(f"the next is {sample!r}")
        break


async def coroutine(client: Samples, count: int) -> None:
    """Do the same in an event loop."""
    first = []
    async for sample in client:
        first.append(sample)
        if len(first) == count:
            break
    print(f"{len(first)} samples, the last is {first[-1]!r}", flush=True)
    async for sample in client:
        print(f"the next is {sample!r}")
        break


def main() -> None:
    """Take samples in the way that the command line says."""
    parser = argparse.ArgumentParser(description="Loop over the samples of a stream.")
    parser.add_argument("way", choices=["script", "asyncio"])
    parser.add_argument("--count", type=int, default=1000, help="of samples (%(default)s)")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    if options.count < 1:
        parser.error("count must be at least 1")
    try:
        client = Samples(options.url)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level="INFO", format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with contextlib.suppress(KeyboardInterrupt):
        if options.way == "script":
            script(client, options.count)
        else:
            asyncio.run(coroutine(client, options.count))


if __name__ == "__main__":
    main()
