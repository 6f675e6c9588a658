"""Stream a source that blocks: a device, a database, a web page that is slow to answer.

    python -m tests.recipes.blocking_source

Replace `measure`. It runs in a thread of its own, so the clients are served meanwhile. A reading
that fails is one line, and the next one follows. Follow the stream with
mean_variance.py. It needs only Tornado. Its limits: Ctrl-C waits for the current reading, so a
source that can stay silent for ever needs a timeout of its own.
"""

import asyncio
import logging
import random
import time

from server import WebSocketServer, make_app, run, serve

log = logging.getLogger("source")


def measure() -> float:
    """A stand-in for the source."""
    time.sleep(0.5)
    return random.gauss(20, 0.5)


async def follow() -> None:
    while True:
        try:
            WebSocketServer.send_message([await asyncio.to_thread(measure)])
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a reading
            log.warning("no sample: %r", error)
            await asyncio.sleep(0.5)  # a source that is gone fails at once


async def main() -> None:
    async with asyncio.TaskGroup() as group:  # gather would add a traceback to a taken port
        group.create_task(follow())
        await serve(make_app())


if __name__ == "__main__":
    run(main())
