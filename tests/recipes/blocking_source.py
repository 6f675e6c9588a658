"""Stream a source that blocks: a device, a database, a web page that is slow to answer.

    python -m tests.recipes.blocking_source

Replace `measure`. It runs in a thread of its own, which sends what it has read; the clients are
served meanwhile. A reading that fails is one line in the log, and the next one follows 5 s later. A
sample that cannot be sent, such as NaN, is one line, too, and the next reading is on time. Readings
begin at multiples of the interval, so the pace does not drift; one that takes too long only costs
those that it overlaps. Ctrl-C ends the program at once, even while a reading hangs. Follow the
stream with mean_variance.py. It needs only Tornado.

Its limit: what `measure` has opened is not closed at the end, since the thread is broken off.
"""

import argparse
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from server import WebSocketServer, make_app, run, serve

logger = logging.getLogger("source")


def measure() -> float:
    """Read the source; this is a stand-in for it."""
    time.sleep(0.1)
    return random.gauss(20, 0.5)


def follow(measure: Callable[[], Any], interval: float, pause: float = 5) -> None:
    """Read and send, an interval in seconds apart, until the server has ended."""
    while True:
        time.sleep(interval - time.perf_counter() % interval)
        try:
            sample = measure()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a reading
            logger.warning("no reading: %r; next try in %g s", error, pause)
            time.sleep(pause)  # a source that is gone fails at once, and would fill the log
            continue
        try:
            WebSocketServer.send_message([sample])
        except (TypeError, ValueError) as error:
            logger.warning("refused %.80r: %s", sample, error)
        except RuntimeError:  # the event loop is closed: the server has ended
            return


async def main() -> None:
    """Serve the readings until cancelled."""
    parser = argparse.ArgumentParser(description="Stream a source that blocks.")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    parser.add_argument("--interval", type=int, default=500, help="in milliseconds (%(default)s)")
    options = parser.parse_args()
    try:
        if options.interval < 1:
            raise ValueError("interval must be at least 1")
        app = make_app()
        interval = options.interval / 1000
        # A daemon, or the program would wait for the current reading when it ends.
        threading.Thread(target=follow, args=(measure, interval), daemon=True).start()
        await serve(app, options.port)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    run(main())
