"""A client that survives its own restart: it saves where it is, and goes on from there.

Run it beside a server, stop it in any way, and run it again:

    python -m tests.recipes.checkpoint ws://localhost:8765/websocket checkpoint.json

It needs only Tornado. Its limit: what leaves the server's history while the client is away is
counted as missed. It survives a kill, but not always a power failure (it does not call fsync).
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from client import BetaBinomial, WebSocketClient, watch


class Checkpointed(WebSocketClient):
    """A client whose epoch, position, missed and posterior are in a file, always together."""

    def __init__(self, url: str, path: Path) -> None:
        super().__init__(url)
        self.path = path
        if not path.exists():
            return
        try:
            self.epoch, self.position, self.missed, counts = json.loads(path.read_bytes())
            self.posterior = BetaBinomial(*counts)
            numbers = [self.position, self.missed, *counts]
            if {*map(type, numbers)} != {int} or type(self.epoch) is not str or len(counts) != 2:
                raise TypeError
            if min(numbers) < 0 or min(counts) < 1:
                raise ValueError
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a checkpoint") from error

    def on_message(self, samples: list[Any]) -> None:
        posterior = self.posterior.update(samples)
        state = [self.epoch, self.position + len(samples), self.missed, posterior]
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(state))
        os.replace(new, self.path)  # a kill leaves the old file or the new one, never half of one
        self.posterior = posterior


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("usage: checkpoint.py URL FILE", file=sys.stderr)
        sys.exit(2)
    try:
        follower = Checkpointed(sys.argv[1], Path(sys.argv[2]))
    except (OSError, ValueError) as problem:
        sys.exit(f"checkpoint.py: error: {problem}")
    watch(follower)
