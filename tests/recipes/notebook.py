"""A live plot in Jupyter: a picture of the posterior that moves while you run other cells.

    pip install ipykernel matplotlib

Copy this file beside client.py, start a server, and open the copy in VS Code, or in Jupyter with
jupytext; or copy the cells, each of which begins with %%, into a notebook beside client.py. The
client ends by itself when the sd is small enough. Run the first cell again to begin anew. Run as a
program, this file only prints what you read here.

For any other client, such as NumberClient of mean_variance.py, the same three calls will do:

    client = NumberClient(URL)
    client.start()  # in a thread of its own, which calls on_message
    print(client, client.connected)  # in any cell; if it is not connected, the numbers are old
    client.stop()

Do not call `main` or `watch` there: `main` reads the arguments of the kernel, does not understand
them, and exits; `watch` keeps the cell busy. An exception in `on_message` is printed with its
traceback, and the same samples come again. The limit: while your own cell computes without a pause,
the picture moves more slowly, since both share one Python.
"""

import sys

if "ipykernel" not in sys.modules:
    sys.exit(__doc__)

# %% The picture appears below this cell.
import io
import math
import time
from typing import Any

import numpy as np
from IPython.display import Image, display
from matplotlib.figure import Figure

from client import BetaBinomial, WebSocketClient

URL = "ws://localhost:8765/websocket"
ENOUGH = 0.02  # the sd at which the client stops
PAUSE = 0.2  # seconds between two pictures


def draw(posterior: BetaBinomial) -> Any:
    """Return a picture of the density over 0..1, with mean and sd in its title."""
    a, b = posterior
    p = (np.arange(2000) + 0.5) / 2000
    log_density = (a - 1) * np.log(p) + (b - 1) * np.log(1 - p)
    log_density += math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    # Not pyplot: its figures may be drawn only in the main thread.
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1), xlabel="p", ylabel="density")
    axes.fill_between(p, np.exp(log_density), alpha=0.4)
    axes.plot(p, np.exp(log_density))
    axes.set_ylim(bottom=0)
    axes.set_title(f"mean {posterior.mean:.4f}, sd {posterior.sd:.4f}")
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return Image(png.getvalue())  # type: ignore[no-untyped-call]


class NotebookClient(WebSocketClient):
    """A client that shows its posterior in the cell that has made it, and stops when it is sure."""

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        picture = draw(self.posterior)
        self.picture: Any = display(picture, display_id=True)  # type: ignore[no-untyped-call]
        self.drawn = time.monotonic()

    def on_message(self, samples: list[Any]) -> None:
        posterior = self.posterior.update(samples)
        sure = posterior.sd <= ENOUGH
        if sure or time.monotonic() > self.drawn + PAUSE:
            self.picture.update(draw(posterior))
            self.drawn = time.monotonic()
        self.posterior = posterior
        if sure:
            self.stop()


old = globals().get("client")
if isinstance(old, WebSocketClient):
    old.stop()  # or nothing could stop it any more
client = NotebookClient(URL)
client.start()

# %% Run whatever you like meanwhile.
print(client, "connected" if client.connected else "not connected: these numbers are old")

# %% Stop before the sd is small enough, and show the last picture.
client.stop()
client.picture.update(draw(client.posterior))
