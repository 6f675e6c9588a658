"""Concept drift: ADWIN of the library river notices that p changes in mid-stream.

    pip install river
    python -m tests.recipes.changing_coin server --p 0.3 --then 0.7 --after 1000
    python -m tests.recipes.changing_coin client

You want it when the thing that you measure may change. The plain client mixes what came before
and after a change, and becomes sure of a value that p never had. This one says where it noticed a
change, and begins its posterior anew from there, and at a new run of the stream. Ctrl-C ends either
of the two. Only the client needs river. Its limits: a step from 0.3 to 0.7 is noticed after about
100 samples, a small or slow change much later, and `delta` is the risk of an alarm without a change.
A sample that is not 0 or 1 is left out, and one line says so.
"""

import argparse
import contextlib
import copy
import logging
from typing import Any

from tornado.ioloop import PeriodicCallback

from client import BetaBinomial, WebSocketClient, watch
from server import RandomBernoulli, WebSocketServer, make_app, run, serve

logger = logging.getLogger("client")


class ChangingCoin(RandomBernoulli):
    """A coin whose p becomes `then` after so many samples."""

    def __init__(self, p: float, then: float, after: int) -> None:
        super().__init__(p)
        self.then = RandomBernoulli(then)
        self.after = after

    def sample(self) -> int:
        if self.after <= 0:
            return self.then.sample()
        self.after -= 1
        return super().sample()


class ChangeClient(WebSocketClient):
    """The posterior of the samples since p changed last, or since the stream began anew."""

    delta = 0.002  # the smaller, the fewer false alarms, and the later the true ones

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.detector = self.make_detector()
        self.watched: str | None = None  # the epoch that the detector has seen

    def make_detector(self) -> Any:
        """Return a detector that has seen nothing."""
        from river import drift  # here, since the server does without it

        adwin: Any = drift.ADWIN  # it has no types
        return adwin(self.delta)

    def on_message(self, samples: list[Any]) -> None:
        # A copy: if this fails on the way, the same samples come again, to the state of before.
        posterior, detector = self.posterior, copy.deepcopy(self.detector)
        if self.epoch != self.watched:
            posterior, detector = BetaBinomial(), self.make_detector()
        for offset, sample in enumerate(samples, self.position - len(samples)):
            if sample not in (0, 1):
                logger.warning("refused sample %d, which is not 0 or 1: %.80r", offset, sample)
                continue
            posterior = posterior.update([sample])
            detector.update(sample)
            if detector.drift_detected:
                logger.warning("noticed a change at sample %d", offset)
                posterior, detector = BetaBinomial(), self.make_detector()
        self.posterior, self.detector, self.watched = posterior, detector, self.epoch


async def serve_coin(coin: ChangingCoin, port: int, interval: int) -> None:
    """Toss the coin, and serve it, until cancelled."""
    app = make_app()
    PeriodicCallback(lambda: WebSocketServer.send_message([coin.sample()]), interval).start()
    await serve(app, port)


def main() -> None:
    """Serve or follow, as the command line says."""
    parser = argparse.ArgumentParser(description="A coin that changes, and a client that notices.")
    roles = parser.add_subparsers(dest="role", required=True)
    server, client = roles.add_parser("server"), roles.add_parser("client")
    server.add_argument("--p", type=float, default=0.3, help="at first (%(default)s)")
    server.add_argument("--then", type=float, default=0.7, help="p afterwards (%(default)s)")
    server.add_argument("--after", type=int, default=1000, help="samples (%(default)s)")
    server.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    server.add_argument("--interval", type=int, default=10, help="in milliseconds (%(default)s)")
    client.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    try:
        if options.role == "server":
            coin = ChangingCoin(options.p, options.then, options.after)
            run(serve_coin(coin, options.port, options.interval))
        else:
            with contextlib.suppress(KeyboardInterrupt):  # river takes seconds to import
                watch(ChangeClient(options.url))
    except (ImportError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
