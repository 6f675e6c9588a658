"""Serve the stream, and a page that shows its posterior to people who install nothing.

    python -m tests.recipes.page

Open http://localhost:8765/. Ctrl-C ends it. It needs only Tornado, and page.html and stream.js
beside it. page.html is the model: replace its script with your own. stream.js follows the stream by
the same rule as client.py.

Behind a proxy, the page works under any path, since all its addresses are relative. For nginx:

    location /app/ {
        proxy_pass http://localhost:8765/;
        proxy_http_version 1.1;
        proxy_set_header Upgrade $http_upgrade;
        proxy_set_header Connection upgrade;
        proxy_set_header Host $http_host;
    }

A browser lets every page open a WebSocket to your server, from your visitor's machine and network.
It only says in the Origin header which site the page came from. Tornado compares this with Host
(so the proxy must pass Host on), or trusts the browser's Sec-Fetch-Site header. For any other site
it asks `check_origin`, which answers no: 403. Programs such as client.py send no Origin and pass.
So do not replace `check_origin` with `return True`: then every page that a visitor has open can
read the stream with that visitor's access. If your page is on another host, trust that whole origin:

    app.settings["trusted_origins"] = ["https://example.org"]

Its limit: a script in a page sees no pings. After a silent loss of the network the page says "live"
until the browser gives the connection up.
"""

import argparse
from pathlib import Path

from tornado.ioloop import PeriodicCallback
from tornado.web import Application, StaticFileHandler

from server import RandomBernoulli, WebSocketServer, make_app, run, serve

HERE = Path(__file__).parent


def make_page_app() -> Application:
    """Make a stream, and the application that serves it and the page. Call it in a coroutine."""
    app = make_app()
    files = {"path": HERE, "default_filename": "page.html"}
    app.add_handlers(".*", [(r"/(|stream\.js)", StaticFileHandler, files)])
    return app


async def main() -> None:
    """Toss the coin and serve, until cancelled."""
    parser = argparse.ArgumentParser(description="Serve the stream and its page.")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    options = parser.parse_args()
    coin, app = RandomBernoulli(0.72), make_page_app()
    PeriodicCallback(lambda: WebSocketServer.send_message([coin.sample()]), 100).start()
    try:
        await serve(app, options.port)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    run(main())
