"""A server that listens: a client that knows the key changes p while the stream runs.

    python -m tests.recipes.listening_server

It prints the key, then the URL; set_p.py is the client that speaks. Ctrl-C ends it. It needs only
Tornado. Its limits: the key is sent unencrypted, so use TLS beyond your own machine, as private.py
does. Nobody else is told that p has changed, and a posterior mixes what came before and after.
"""

import secrets

from tornado import ioloop

from server import RandomBernoulli, WebSocketServer, make_app, run, serve


class ListeningServer(WebSocketServer):
    key, coin = secrets.token_hex(), RandomBernoulli(0.72)

    def on_message(self, message: str | bytes) -> None:
        if isinstance(message, bytes):
            return self.close(1003, "text only")
        key, _, p = message.partition(" ")
        # As bytes: compare_digest refuses text that is not ASCII.
        if not secrets.compare_digest(key.encode(), self.key.encode()):
            return self.close(1008, "wrong key")
        try:
            ListeningServer.coin = RandomBernoulli(float(p))  # which checks the range
        except ValueError:
            self.close(1007, "p must be a number from 0 to 1")


async def main() -> None:
    print(ListeningServer.key, flush=True)
    toss = lambda: ListeningServer.send_message([ListeningServer.coin.sample()])
    ioloop.PeriodicCallback(toss, 100).start()
    await serve(make_app(ListeningServer))


if __name__ == "__main__":
    run(main())
