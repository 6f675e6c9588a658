"""What the posterior cannot see: that p changes in mid-stream. ADWIN of the library river notices.

    python -m tests.recipes.changing_coin server --p 0.3 --then 0.7 --after 1000
    python -m tests.recipes.changing_coin client

You want it when the thing that you measure may change. The plain client mixes what came before
and after a change, and becomes sure of a value that p never had. This one says where it noticed a
change, and begins its posterior anew from there, and at a new run of the server. Ctrl-C ends either
of the two. The client needs river. Its limit: a step from 0.3 to 0.7 is noticed after about 100
samples, a small or slow change much later, and `delta` is the risk of an alarm without a change.
"""

import argparse
import copy
import logging
from typing import Any

from tornado import ioloop

from client import BetaBinomial, WebSocketClient, watch
from server import RandomBernoulli, WebSocketServer, make_app, run, serve

log = logging.getLogger("client")


class ChangingCoin(RandomBernoulli):
    """A coin whose p becomes `then` after so many samples."""

    def __init__(self, p: float, then: float, after: int) -> None:
        super().__init__(p)
        self.then = RandomBernoulli(then)
        self.after = after

    def sample(self) -> int:
        if self.after == 0:
            return self.then.sample()
        self.after -= 1
        return super().sample()


class ChangeClient(WebSocketClient):
    """The posterior of the samples since p changed last, or since the server began anew."""

    delta = 0.002  # the smaller, the fewer false alarms, and the later the true ones

    def __init__(self, url: str, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.detector = self.make_detector()
        self.watched: str | None = None  # the epoch that the detector has seen

    def make_detector(self) -> Any:
        from river import drift  # here, since the server does without it

        adwin: Any = drift.ADWIN  # it has no types
        return adwin(self.delta)

    def on_message(self, samples: list[Any]) -> None:
        BetaBinomial().update(samples)  # raises ValueError unless all of them are 0 or 1
        # A copy: if this fails on the way, the same samples come again, to the state of before.
        posterior, detector = self.posterior, copy.deepcopy(self.detector)
        if self.epoch != self.watched:
            posterior, detector = BetaBinomial(), self.make_detector()
        begin = 0  # of the samples that the posterior lacks
        for end, sample in enumerate(samples, 1):
            detector.update(sample)
            if detector.drift_detected:
                log.warning("noticed a change at sample %d", self.position + end - 1)
                posterior, detector, begin = BetaBinomial(), self.make_detector(), end
        self.posterior = posterior.update(samples[begin:])
        self.detector, self.watched = detector, self.epoch


async def serve_coin(coin: ChangingCoin, port: int, interval: int) -> None:
    toss = lambda: WebSocketServer.send_message([coin.sample()])
    ioloop.PeriodicCallback(toss, interval).start()
    await serve(make_app(), port)


def main() -> None:
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
        if options.role == "client":
            return watch(ChangeClient(options.url))
        if options.after < 0 or options.interval < 1:
            raise ValueError("after must be at least 0, interval at least 1")
        coin = ChangingCoin(options.p, options.then, options.after)
        run(serve_coin(coin, options.port, options.interval))
    except KeyboardInterrupt:
        pass  # while river was being imported, which takes a second or more
    except (ImportError, OSError, ValueError) as error:
        parser.exit(1 if isinstance(error, OSError) else 2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
