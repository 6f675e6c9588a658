"""Two streams in one server, each with its own URL, epoch and history.

    python -m tests.recipes.two_streams
    python client.py
    python client.py --url ws://localhost:8765/rare

Ctrl-C ends each of the three. It needs only Tornado. Its limit: `max_clients` is for both streams
together.
"""

from tornado import ioloop

from server import RandomBernoulli, WebSocketServer, make_app, run, serve


class Usual(WebSocketServer):
    coin = RandomBernoulli(0.72)


class Rare(WebSocketServer):
    coin = RandomBernoulli(0.05)


def toss() -> None:
    for stream in Usual, Rare:
        stream.send_message([stream.coin.sample()])  # not of WebSocketServer: it has no clients


async def main() -> None:
    app = make_app(Usual)
    app.add_handlers(".*", [("/rare/?", Rare)])
    ioloop.PeriodicCallback(toss, 100).start()
    await serve(app)


if __name__ == "__main__":
    run(main())
