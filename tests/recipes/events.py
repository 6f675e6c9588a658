"""Send the samples as Server-Sent Events, for browsers behind a proxy that passes only plain HTTP.

Run it, and open http://localhost:8765/. Another port is `--port 9000`, and Ctrl-C ends it:

    python -m tests.recipes.events

It needs only Tornado, and page.html and stream.js beside it. The page is that of page.py, but it
follows /events. The `id` of an event is `epoch:offset`, with the offset of the next sample. The
browser sends it back as Last-Event-ID when it reconnects, so it goes on exactly there.

`EventStream` is a stream of its own, with its own epoch: feed it with `EventStream.send_message`.

Its limits: there are no pings, so a client whose network fell silent counts as connected until TCP
gives up. While there is no sample nothing is sent, so nginx ends the response after 60 s, and the
browser comes back. A browser opens at most six such connections to a server over HTTP/1.1.
"""

import argparse
import asyncio
import functools
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tornado import ioloop, web

from server import RandomBernoulli, WebSocketServer, make_app, run, serve

HERE = Path(__file__).parent


class EventStream(WebSocketServer):
    """An instance is one endless response; the class holds the log, as in server.py."""

    def prepare(self) -> None:
        self.ended = asyncio.Event()
        epoch, colon, offset = self.request.headers.get("Last-Event-ID", "").partition(":")
        if colon:  # newer than the position in the URL, which a browser never changes
            self.request.query = urlencode({"epoch": epoch, "offset": offset})
        super().prepare()

    async def get(self, *args: Any, **kwargs: Any) -> None:
        self.set_header("Content-Type", "text/event-stream")
        self.set_header("Cache-Control", "no-store")
        self.set_header("X-Accel-Buffering", "no")  # or nginx holds events back until it has 4 kB
        self.open()
        await self.ended.wait()
        self.on_close()  # before the response is finished, so that nothing more is written

    @classmethod
    @functools.lru_cache(maxsize=8)
    def message(cls, offset: int, end: int) -> bytes:
        """Encode an event; its id is where the client stands after it."""
        data = super().message(offset, end)
        return b"id: %s:%d\ndata: %s\n\n" % (cls.epoch.encode(), end, data)

    def write_message(self, message: Any, binary: bool = False) -> asyncio.Future[None]:
        self.write(message)
        return self.flush()

    def set_nodelay(self, value: bool) -> None:
        connection: Any = self.request.connection
        connection.stream.set_nodelay(value)

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        self.ended.set()

    def on_connection_close(self) -> None:
        self.ended.set()


class Page(web.RequestHandler):
    """The page of page.py, with another last line."""

    def get(self) -> None:
        page = (HERE / "page.html").read_text(encoding="utf-8")
        self.write(page.replace("follow();", "followEvents();"))


async def main() -> None:
    """Sample and serve until cancelled, the same samples at /websocket and at /events."""
    parser = argparse.ArgumentParser(description="Serve the stream as Server-Sent Events, too.")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    app = make_app()
    script = (r"/(stream\.js)", web.StaticFileHandler, {"path": HERE})
    app.add_handlers(".*", [("/", Page), script, ("/events", EventStream)])
    coin = RandomBernoulli(0.72)

    def toss() -> None:
        samples = [coin.sample()]
        WebSocketServer.send_message(samples)
        EventStream.send_message(samples)

    try:
        ioloop.PeriodicCallback(toss, 100).start()
        await serve(app, parser.parse_args().port)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    run(main())
