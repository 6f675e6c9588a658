"""A server that listens: a client that knows the key changes p while the stream runs.

    export KEY=a-word-that-nobody-guesses
    python -m tests.recipes.listening server
    python -m tests.recipes.listening client 0.5

You want it when a client has to steer the source. Give the same KEY to both; client.py follows the
stream without it. Ctrl-C ends the server. The client that speaks ends by itself, as soon as the
server has answered. It needs only Tornado.

Its limits: the key is sent unencrypted, so use TLS beyond your own machine, as private.py does.
Those who follow the stream are not told that p has changed, and a posterior mixes what came before
and after.
"""

import argparse
import os
import secrets

from tornado.httpclient import HTTPClientError
from tornado.ioloop import PeriodicCallback
from tornado.websocket import WebSocketError, websocket_connect

from client import WebSocketClient
from server import RandomBernoulli, WebSocketServer, logger, make_app, run, serve


class ListeningServer(WebSocketServer):
    """A client that may set p, with a text of the key, a space and p."""

    key = secrets.token_hex()  # until it is set, nobody knows it
    coin = RandomBernoulli(0.72)

    def on_message(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            self.close(1003, "text only")
            return
        key, _, p = message.partition(" ")
        # As bytes: compare_digest refuses text that is not ASCII.
        if not secrets.compare_digest(key.encode(), self.key.encode()):
            self.close(1008, "wrong key")
            return
        try:
            ListeningServer.coin = RandomBernoulli(float(p))  # which checks the range
            logger.info("p is %g now", self.coin.p)
        except ValueError:
            self.close(1007, "p must be a number from 0 to 1")


async def serve_coin(key: str, port: int) -> None:
    """Serve a coin whose p can be set by those who know the key, until cancelled."""
    ListeningServer.key = key
    app = make_app(ListeningServer)
    toss = lambda: ListeningServer.send_message([ListeningServer.coin.sample()])
    PeriodicCallback(toss, 100).start()
    await serve(app, port)


async def set_p(url: str, key: str, p: str) -> None:
    """Send key and p; ConnectionError if that is refused."""
    request = WebSocketClient(url).request(url)  # which checks the URL, and has time limits
    try:
        connection = await websocket_connect(request)
    except (HTTPClientError, WebSocketError) as error:
        raise ConnectionError(f"cannot connect: {error}") from error
    await connection.write_message(f"{key} {p}")
    connection.close(1000)
    while await connection.read_message() is not None:
        pass  # the stream goes on until the server has closed, too
    if connection.close_code != 1000:
        raise ConnectionError(f"refused: {connection.close_code} {connection.close_reason}")


def main() -> None:
    """Serve, or set p, as the command line says."""
    parser = argparse.ArgumentParser(description="A coin whose p can be set.")
    roles = parser.add_subparsers(dest="role", required=True)
    server, client = roles.add_parser("server"), roles.add_parser("client")
    server.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    client.add_argument("p", help="probability of a 1")
    client.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    key = os.environ.get("KEY", "")
    try:
        if not key or " " in key:
            raise ValueError("KEY must be set, without a space in it")
        if options.role == "server":
            run(serve_coin(key, options.port))
        else:
            run(set_p(options.url, key, options.p))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
