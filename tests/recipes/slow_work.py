"""Slow work on each sample: four at a time, the results in order, and the stream waits.

    python -m tests.recipes.slow_work --url ws://localhost:8765/websocket

You want it when the work on a sample takes longer than the time between two. Replace `work`.
Ctrl-C waits for the calls that have begun, not for those that wait. It needs only Tornado. Its
limits: after an exception up to four samples come again, so `work` must be idempotent. When all
that has come takes more than 10 s (80 samples at 0.5 s each), a ping goes unanswered: the server
drops the client, which comes back, and may have missed samples.
"""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from client import WebSocketClient, main

log = logging.getLogger("work")


def work(sample: Any) -> str:
    """A stand-in for what takes time: a query, a request, a file."""
    time.sleep(0.5)
    return f"{sample} is done"


class SlowClient(WebSocketClient):
    stopping = False

    def on_message(self, samples: list[Any]) -> None:
        first = self.position
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, len(samples), 4):
                if self.stopping:
                    raise asyncio.CancelledError
                for result in list(pool.map(work, samples[start : start + 4])):
                    log.info("%s", result)
                # If this ends early, the stream goes on after the last part that is done.
                self.position = first + len(samples[: start + 4])
        self.position = first  # the client itself moves it when this returns

    def stop(self) -> None:
        self.stopping = True
        super().stop()  # which waits for on_message
        self.stopping = False

    def __str__(self) -> str:
        return f"position {self.position}  missed {self.missed}"


if __name__ == "__main__":
    main(SlowClient)
