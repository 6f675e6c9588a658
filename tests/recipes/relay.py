"""Pass it on: the posterior of one stream as a stream at port 8766, and as a page for people.

    python -m tests.recipes.relay --url ws://localhost:8765/websocket

You want it when others need your result rather than the samples. The page is at
http://localhost:8766/. A sample of the new stream, {"trials": 3, "mean": 0.6, "sd": 0.2}, is sent
whenever the posterior changes. Ctrl-C ends it. It needs only Tornado. Its limit: the counts are in
memory. Started again, the relay begins a new epoch with what the history of the first server still
holds.
"""

import argparse
import asyncio
from typing import Any

from tornado import web

from client import BetaBinomial, WebSocketClient
from server import WebSocketServer, make_app, run, serve


def summary(posterior: BetaBinomial) -> dict[str, Any]:
    """Make what is sent of a posterior."""
    trials = posterior.alpha + posterior.beta - 2  # the flat prior has 1 of each
    return {"trials": trials, "mean": posterior.mean, "sd": posterior.sd}


class Relay(WebSocketClient):
    def on_message(self, samples: list[Any]) -> None:
        posterior = self.posterior.update(samples)
        WebSocketServer.send_message([summary(posterior)])
        self.posterior = posterior  # last: after an exception the same samples come again


class Page(web.RequestHandler):
    def initialize(self, relay: Relay) -> None:
        self.relay = relay

    def get(self) -> None:
        self.set_header("Refresh", "1")  # second, until the browser asks again
        self.write(str(self.relay.posterior))


async def main() -> None:
    parser = argparse.ArgumentParser(description="Serve the posterior of a stream.")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    try:
        relay = Relay(parser.parse_args().url)
    except ValueError as error:
        parser.error(str(error))
    app = make_app()
    app.add_handlers(".*", [("/", Page, {"relay": relay})])
    async with asyncio.TaskGroup() as group:
        group.create_task(relay.run())
        await serve(app, 8766)


if __name__ == "__main__":
    run(main())
