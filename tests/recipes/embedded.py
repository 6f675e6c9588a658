"""The stream inside a Tornado application of your own: behind its login, beside its other pages.

    python server.py
    python -m tests.recipes.embedded --url ws://localhost:8765/websocket --port 8766

You want it when you have an application already. The client of client.py runs in it as a task: it
follows the stream at --url, keeps statistics, and passes the samples on to the application's own
stream. If you have a source of your own, call `Members.send_message` there instead. Members get
the page, the stream and /statistics as JSON; /health answers to everybody. The program prints its
password; log in at http://localhost:8766/. Ctrl-C ends it. It needs only Tornado.

An Application of your own needs what make_app would give it: pings, or clients that have vanished
stay for ever; a limit for what a client may send, or it is 10 MiB; and the stream of the handler.
`serve` adds time limits for silent peers, and the goodbye.

Its limits: `Login` is a stand-in for yours, with one password, sent unencrypted, that anybody may
try to guess. PASSWORD and COOKIE_SECRET come from the environment; if they are not set, they are
random, and a restart logs everybody out. A stream that is open stays open after a logout. The page
does not reconnect; page.py shows one that does.
"""

import argparse
import asyncio
import os
import secrets
from typing import Any

from tornado.web import Application, HTTPError, RequestHandler, authenticated

from client import WebSocketClient
from server import Stream, WebSocketServer, run, serve

FORM = """<!DOCTYPE html><title>Log in</title>
<form method="post"><label>Password <input type="password" name="password"></label></form>
"""
PAGE = """<!DOCTYPE html><title>The stream</title><p id="newest"></p>
<script>
const url = location.origin.replace("http", "ws") + "/websocket";
new WebSocket(url).onmessage = message => { newest.textContent = message.data; };
</script>
"""


class Statistics(WebSocketClient):
    """Keeps the posterior of another stream, and passes the samples on."""

    def on_message(self, samples: list[Any]) -> None:
        posterior = self.posterior.update(samples)
        Members.send_message(samples)
        self.posterior = posterior  # last: after an exception the same samples come again


class Visitor(RequestHandler):
    """A request that knows who is logged in."""

    def get_current_user(self) -> bytes | None:
        return self.get_signed_cookie("user")


class Login(Visitor):
    """A stand-in for the login of your application."""

    def get(self) -> None:
        self.write(FORM)

    def post(self) -> None:
        given, password = self.get_body_argument("password"), self.settings["password"]
        # As bytes: compare_digest refuses text that is not ASCII.
        if not secrets.compare_digest(given.encode(), password.encode()):
            raise HTTPError(403, reason="wrong password")
        self.set_signed_cookie("user", "a member", httponly=True, samesite="Lax")
        self.redirect("/")


class Page(Visitor):
    """A page for members."""

    @authenticated
    def get(self) -> None:
        self.write(PAGE)


class StatisticsPage(Visitor):
    """The current statistics as JSON."""

    @authenticated
    def get(self) -> None:
        client: Statistics = self.settings["statistics"]
        posterior = client.posterior
        trials = posterior.alpha + posterior.beta - 2  # the flat prior has 1 of each
        self.write({"trials": trials, "mean": posterior.mean, "sd": posterior.sd})


class Health(RequestHandler):
    """What a load balancer asks for: 200 as long as the application answers."""

    def get(self) -> None:
        self.write({"connected": self.settings["statistics"].connected})


class Members(Visitor, WebSocketServer):
    """A client of the stream that is logged in."""

    def prepare(self) -> None:
        if not self.current_user:
            raise HTTPError(403, reason="not logged in")
        super().prepare()


def make_application(statistics: Statistics, password: str, cookie_secret: str) -> Application:
    """Make the stream, and the application with all of its pages. Call it in a coroutine."""
    Members.stream = Stream()
    return Application(
        [
            ("/", Page),
            ("/login", Login),
            ("/statistics", StatisticsPage),
            ("/health", Health),
            ("/websocket", Members),
        ],
        login_url="/login",
        cookie_secret=cookie_secret,
        password=password,
        statistics=statistics,
        websocket_ping_interval=10,  # seconds
        websocket_max_message_size=1024,  # bytes
    )


async def main() -> None:
    """Follow and serve until cancelled."""
    parser = argparse.ArgumentParser(description="A stream inside an application.")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    parser.add_argument("--port", type=int, default=8766, help="0 takes a free one (%(default)s)")
    options = parser.parse_args()
    password = os.environ.get("PASSWORD") or secrets.token_urlsafe()
    cookie_secret = os.environ.get("COOKIE_SECRET") or secrets.token_hex()
    async with asyncio.TaskGroup() as group:
        try:
            statistics = Statistics(options.url)
            app = make_application(statistics, password, cookie_secret)
            print(password, flush=True)
            group.create_task(statistics.run())
            await serve(app, options.port)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    run(main())
