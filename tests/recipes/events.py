"""Send the samples as Server-Sent Events, for browsers behind a proxy that passes only plain HTTP.

    python -m tests.recipes.events

Open http://localhost:8765/. Ctrl-C ends it. It needs only Tornado, and page.html and stream.js
beside it. The page is that of page.py, but it follows /events. The messages are those of
/websocket, which serves the same stream beside it.

The `id` of an event is `epoch:offset`, with the offset of the next sample. A page without stream.js
needs no more than `new EventSource("/events")`: the browser sends the id back when it reconnects,
as Last-Event-ID, and goes on exactly there.

Its limits: there are no pings. After 15 s without a sample the server sends an empty message, so
that no proxy ends the response (nginx would after 60 s), but a client whose network fell silent
counts until TCP gives up. A browser opens at most six such connections to a server over HTTP/1.1.
"""

import argparse
import asyncio
import contextlib
import re
from pathlib import Path
from typing import ClassVar

from tornado.ioloop import PeriodicCallback
from tornado.iostream import StreamClosedError
from tornado.web import Application, HTTPError, RequestHandler, StaticFileHandler

from server import RandomBernoulli, WebSocketServer, make_app, run, serve

HERE = Path(__file__).parent


class Events(RequestHandler):
    """One client: its request gets a response that does not end."""

    clients: ClassVar[set["Events"]] = set()
    max_clients = 100  # each is an open file, beside those of WebSocketServer
    silence = 15.0  # seconds, until an empty message says that the server is still there

    def prepare(self) -> None:
        if len(self.clients) >= self.max_clients:
            raise HTTPError(503, reason="too many clients")
        epoch, colon, offset = self.request.headers.get("Last-Event-ID", "").partition(":")
        if not colon:  # it is newer than the position in the URL, which a browser never changes
            epoch = self.get_query_argument("epoch", "")
            offset = self.get_query_argument("offset", "")
        self.stream = WebSocketServer.stream
        self.position = 0
        if epoch == self.stream.epoch and re.fullmatch("[0-9]{1,15}", offset):
            self.position = min(int(offset), self.stream.end)

    async def get(self) -> None:
        """Send what this client lacks, wait for more, and so on, until the client has left."""
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Accel-Buffering", "no")  # or nginx holds events back until it has 4 kB
        self.clients.add(self)
        # The client has left, or the program ends.
        with contextlib.suppress(StreamClosedError, asyncio.CancelledError):
            while True:
                message, self.position = self.stream.read(self.position)
                self.write(f"id: {self.stream.epoch}:{self.position}\ndata: {message}\n\n")
                await self.flush()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.silence):
                        # Nothing is appended between this test and wait(), as in server.py.
                        while self.position >= self.stream.end:
                            await self.stream.grown.wait()

    def on_connection_close(self) -> None:
        self.clients.discard(self)  # what waits in `get` ends when it sends the next message


class Page(RequestHandler):
    """The page of page.py, with another last line."""

    def get(self) -> None:
        page = (HERE / "page.html").read_text(encoding="utf-8")
        self.write(page.replace('"websocket", WebSocket', '"events", EventSource'))


def make_events_app() -> Application:
    """Make a stream, and the application that serves it both ways, and the page."""
    app = make_app()
    script = (r"/(stream\.js)", StaticFileHandler, {"path": HERE})
    app.add_handlers(".*", [("/", Page), script, ("/events", Events)])
    return app


async def main() -> None:
    """Toss the coin and serve, until cancelled."""
    parser = argparse.ArgumentParser(description="Serve the stream as Server-Sent Events, too.")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    options = parser.parse_args()
    coin, app = RandomBernoulli(0.72), make_events_app()
    PeriodicCallback(lambda: WebSocketServer.send_message([coin.sample()]), 100).start()
    try:
        await serve(app, options.port)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    run(main())
