"""A model of your own: the running mean and variance of a stream of numbers (Welford's algorithm).

    python -m tests.recipes.mean_variance --url ws://localhost:8765/websocket

Ctrl-C ends it. A sample may also be a number as text, such as a line of growing_file.py. Anything
else, and what is not finite, is refused: it is counted, and one line says so. It needs only Tornado.
In a notebook, call `NumberClient(URL).start()` instead of `main`. Its limit: the mean is that of all
samples since the start, so it is slow to follow a source that changes.
"""

import dataclasses
import logging
import math
from typing import Any

from client import WebSocketClient, main

logger = logging.getLogger("model")


@dataclasses.dataclass(frozen=True)
class MeanVariance:
    """What is known of the numbers that have come so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # the sum of squared deviations from the mean

    def add(self, x: float) -> "MeanVariance":
        """Return the model after this number too; ValueError if it is not finite."""
        mean = self.mean + (x - self.mean) / (self.count + 1)
        squares = self.squares + (x - self.mean) * (x - mean)
        if not math.isfinite(squares):  # a single NaN would stay for good
            raise ValueError(f"not a finite number, or too large: {x}")
        return MeanVariance(self.count + 1, mean, squares)

    @property
    def variance(self) -> float:
        return self.squares / (self.count - 1) if self.count > 1 else math.nan


class NumberClient(WebSocketClient):
    """A client that takes numbers, and refuses anything else."""

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.model = MeanVariance()
        self.refused = 0

    def on_message(self, samples: list[Any]) -> None:
        model, refused = self.model, []
        for sample in samples:
            try:
                model = model.add(float(sample))
            except (TypeError, ValueError, OverflowError):
                refused.append(sample)
        if refused:
            logger.warning("refused %d samples, the first is %.80r", len(refused), refused[0])
        self.model, self.refused = model, self.refused + len(refused)

    def __str__(self) -> str:
        model = self.model
        text = f"{model.count} samples  mean {model.mean:.6g}  variance {model.variance:.6g}"
        return f"{text}  missed {self.missed}  refused {self.refused}"


if __name__ == "__main__":
    main(NumberClient)
