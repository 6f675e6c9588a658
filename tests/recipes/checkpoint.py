"""A client that survives its own restart: it saves where it is, and goes on from there.

Run it beside a server, stop it with Ctrl-C or a kill, and run it again:

    python -m tests.recipes.checkpoint checkpoint.json --url ws://localhost:8765/websocket

For a model of your own, write a subclass of `Checkpointed` like `SavedPosterior`: a `state` that
JSON can hold, and `update`, which returns the next state. It needs only Tornado, and a file for each
client. Its limits: the whole state is written for each list of samples, so keep it small. What leaves
the server's history while the client is away is counted as missed. It survives a kill, but not always
a power failure (it does not call fsync).
"""

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

from client import BetaBinomial, WebSocketClient, watch

logger = logging.getLogger("client")


class Checkpointed(WebSocketClient):
    """A client whose position and state are in a file, always together."""

    state: Any = None  # at first; anything that JSON can hold

    def __init__(self, url: str, path: Path, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.path = path
        if path.exists():
            self.load()
        self.save(self.state)  # or say at once that it cannot

    def update(self, samples: list[Any]) -> Any:
        """Return the state after these samples too, and leave `self.state` as it is."""
        raise NotImplementedError

    def on_message(self, samples: list[Any]) -> None:
        state = self.update(samples)
        self.save(state)  # epoch, position and missed are already those after these samples
        self.state = state  # last: after an exception the same samples come again

    def load(self) -> None:
        """Read the file; ValueError if it is not one of these."""
        try:
            match json.loads(self.path.read_bytes()):
                case {
                    "epoch": str() | None as epoch,
                    "position": int(position),
                    "missed": int(missed),
                    "state": state,
                }:
                    self.epoch, self.position, self.missed = epoch, position, missed
                    self.state = state
                case _:
                    raise ValueError("not its keys and types")
            self.update([])  # raises an exception if this is the state of another model
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is not a checkpoint of this model: {error!r}") from error

    def save(self, state: Any) -> None:
        """Write a new file, and put it in the place of the old one."""
        saved = {"epoch": self.epoch, "position": self.position, "missed": self.missed}
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(json.dumps(saved | {"state": state}))
        os.replace(new, self.path)  # a kill leaves the old file or the new one, never half of one


class SavedPosterior(Checkpointed):
    """The posterior, and a count of the samples that are not 0 or 1."""

    state: Any = (1, 1, 0)  # alpha, beta and the count

    def update(self, samples: list[Any]) -> Any:
        alpha, beta, refused = self.state
        taken = [sample for sample in samples if sample in (0, 1)]
        if len(taken) < len(samples):
            logger.warning("refused %d samples that are not 0 or 1", len(samples) - len(taken))
        posterior = BetaBinomial(alpha, beta).update(taken)
        return [*posterior, refused + len(samples) - len(taken)]

    def __str__(self) -> str:
        alpha, beta, refused = self.state
        return f"{BetaBinomial(alpha, beta)}  missed {self.missed}  refused {refused}"


def main() -> None:
    """Watch a client that goes on where its file says."""
    parser = argparse.ArgumentParser(description="Follow a stream from where a file says.")
    parser.add_argument("file", type=Path, help="to save in, made when it is not there")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    try:
        client = SavedPosterior(options.url, options.file)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    watch(client)


if __name__ == "__main__":
    main()
