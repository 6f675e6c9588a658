"""Any JSON as a sample: text, lists, objects. Here both ends of the stream are in one process.

    python -m tests.recipes.json_samples

Ctrl-C ends both. Replace `measure` and what `on_message` makes of a sample. One that it does not
understand is refused: it is counted, and one line says so. It needs only Tornado. Its limit: a
message holds up to 1,000 samples and a client takes up to 10 MiB, so lower `message_size` where
samples are longer than 10,000 bytes.
"""

import asyncio
import logging
import random
from typing import Any

from client import WebSocketClient
from server import WebSocketServer, make_app, run, serve

log = logging.getLogger("model")


class Thermometers(WebSocketClient):
    newest: tuple[str, float] | None = None
    refused = 0

    def on_message(self, samples: list[Any]) -> None:
        newest, refused = self.newest, []
        for sample in samples:
            match sample:
                case {"place": str(place), "celsius": int(celsius) | float(celsius)}:
                    newest = (place, celsius)
                case _:
                    refused.append(sample)
        if refused:
            log.warning("refused %d samples, the first is %.80r", len(refused), refused[0])
        self.newest, self.refused = newest, self.refused + len(refused)


def measure() -> dict[str, Any]:
    """A stand-in for the source."""
    return {"place": random.choice(["cellar", "roof"]), "celsius": random.gauss(15, 5)}


async def follow(client: Thermometers) -> None:
    while True:
        WebSocketServer.send_message([measure()])
        await asyncio.sleep(1)
        print(client.newest, flush=True)


async def main() -> None:
    client = Thermometers("ws://localhost:8765/websocket")
    async with asyncio.TaskGroup() as group:
        group.create_task(client.run())
        group.create_task(follow(client))
        await serve(make_app())


if __name__ == "__main__":
    run(main())
