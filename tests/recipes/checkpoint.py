"""A client that survives its own restart: it saves where it is, and goes on from there.

Run it beside a server, stop it with Ctrl-C or a kill, and run it again:

    python -m tests.recipes.checkpoint checkpoint.json --url ws://localhost:8765/websocket

For another model, replace what `_load`, `_save` and `on_message` say of the posterior. It needs
only Tornado, and a file for each client. A sample that is not 0 or 1 is left out and counted as
refused. Its limits: what leaves the server's history while the client is away is counted
as missed. It survives a kill, but not always a power failure (it does not call fsync).
"""

import argparse
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

from client import BetaBinomial, WebSocketClient, watch

log = logging.getLogger("client")


class Checkpointed(WebSocketClient):
    """A client whose epoch, position, counts and posterior are in a file, always together.

    To begin with another prior, set `posterior` before the client starts if `epoch` is None.
    """

    def __init__(self, url: str, path: Path, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.path = path
        self.refused = 0  # samples that the model does not take
        if path.exists():
            try:
                self._load()
            except (KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is not a checkpoint") from error
        self._save(self.posterior, self.refused, self.position)  # or say at once that it cannot

    def __str__(self) -> str:
        return f"{super().__str__()}  refused {self.refused}"

    def _load(self) -> None:
        state = json.loads(self.path.read_bytes())
        epoch, prior = state["epoch"], BetaBinomial(*state["posterior"])
        numbers = [state["position"], state["missed"], state["refused"]]
        if not (epoch is None or type(epoch) is str) or {*map(type, numbers)} != {int}:
            raise TypeError
        if not {*map(type, prior)} <= {int, float}:
            raise TypeError
        if min(numbers) < 0 or min(prior) <= 0 or not all(map(math.isfinite, prior)):
            raise ValueError
        self.epoch, self.posterior = epoch, prior
        self.position, self.missed, self.refused = numbers

    def _save(self, posterior: BetaBinomial, refused: int, position: int) -> None:
        state = {"epoch": self.epoch, "position": position, "missed": self.missed}
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(state | {"refused": refused, "posterior": posterior}))
        os.replace(new, self.path)  # a kill leaves the old file or the new one, never half of one

    def on_message(self, samples: list[Any]) -> None:
        taken = [sample for sample in samples if sample in (0, 1)]
        posterior = self.posterior.update(taken)
        refused = self.refused + len(samples) - len(taken)
        self._save(posterior, refused, self.position + len(samples))
        if refused > self.refused:
            log.warning("refused %d samples that are not 0 or 1", refused - self.refused)
        self.posterior, self.refused = posterior, refused


def main() -> None:
    """Watch a client that goes on where its file says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="to save in, made when it is not there")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    try:
        client = Checkpointed(options.url, options.file)
    except (OSError, ValueError) as error:
        parser.exit(1 if isinstance(error, OSError) else 2, f"{parser.prog}: error: {error}\n")
    watch(client)


if __name__ == "__main__":
    main()
