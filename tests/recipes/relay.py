"""Pass it on: follow one stream, and serve what you make of it as another one, and as a page.

    python server.py
    python -m tests.recipes.relay --url ws://localhost:8765/websocket --port 8766

You want it when others need your result rather than the samples. Whenever the posterior changes, it
is sent as a sample of the new stream, ws://localhost:8766/websocket:

    {"trials": 3, "mean": 0.6, "sd": 0.2}

http://localhost:8766/ shows it to people. Ctrl-C ends the program. It needs only Tornado. To relay
something else, replace `summary`; to relay the samples themselves, send `samples`.

Its limit: the counts are in memory. Started again, the relay begins a new epoch with what the
history of the first server still holds.
"""

import argparse
import asyncio
from typing import Any

from tornado.web import RequestHandler

from client import BetaBinomial, WebSocketClient
from server import WebSocketServer, make_app, run, serve


def summary(posterior: BetaBinomial) -> Any:
    """Make what is sent of a posterior."""
    trials = posterior.alpha + posterior.beta - 2  # the flat prior has 1 of each
    return {"trials": trials, "mean": posterior.mean, "sd": posterior.sd}


class Relay(WebSocketClient):
    """A client of the first stream, which feeds the second one."""

    def on_message(self, samples: list[Any]) -> None:
        posterior = self.posterior.update(samples)
        WebSocketServer.send_message([summary(posterior)])
        self.posterior = posterior  # last: after an exception the same samples come again


class Page(RequestHandler):
    """What client.py prints, for a browser."""

    def initialize(self, relay: Relay) -> None:
        self.relay = relay

    def get(self) -> None:
        self.set_header("Refresh", "1")  # second, until the browser asks again
        self.write(f"<pre>{self.relay}</pre>")


async def main() -> None:
    """Follow and serve, until cancelled."""
    parser = argparse.ArgumentParser(description="Serve the posterior of a stream.")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    parser.add_argument("--port", type=int, default=8766, help="0 takes a free one (%(default)s)")
    options = parser.parse_args()
    async with asyncio.TaskGroup() as group:
        try:
            relay = Relay(options.url)
            app = make_app()
            app.add_handlers(".*", [("/", Page, {"relay": relay})])
            group.create_task(relay.run())
            await serve(app, options.port)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    run(main())
