"""A private stream over a network: TLS, and a token that the server checks before the upgrade.

Make a certificate for the name that clients will use, and a token for both sides:

    openssl req -x509 -newkey rsa:2048 -nodes -days 365 -keyout key.pem -out cert.pem \
        -subj /CN=localhost -addext subjectAltName=DNS:localhost
    export TOKEN=$(openssl rand -hex 32)
    python -m tests.recipes.private server cert.pem key.pem
    python -m tests.recipes.private client cert.pem wss://localhost:8765/websocket

Ctrl-C ends either of the two. The client needs the same TOKEN, and cert.pem, never key.pem. Give
the server --address, to be reached from elsewhere. It needs only Tornado. Its limit: all clients
have the same token, so replace it to lock one out.
"""

import argparse
import os
import secrets
import ssl

from tornado.httpclient import HTTPRequest
from tornado.ioloop import PeriodicCallback
from tornado.web import HTTPError

from client import WebSocketClient, watch
from server import RandomBernoulli, WebSocketServer, make_app, run, serve


def read_token() -> str:
    """Return the token without the newline that a file leaves; ValueError if it is unusable."""
    token = os.environ.get("TOKEN", "").rstrip()
    if not (token.isascii() and token.isprintable() and token) or " " in token:
        raise ValueError("TOKEN must be set to ASCII characters without spaces")
    return token


class PrivateServer(WebSocketServer):
    """A client that has shown the token."""

    token = secrets.token_hex()  # until it is set, nobody knows it

    def prepare(self) -> None:
        given = self.request.headers.get("Authorization", "")
        # As bytes: compare_digest refuses text that is not ASCII.
        if not secrets.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise HTTPError(401, reason="wrong token" if given else "no token")
        super().prepare()


class PrivateClient(WebSocketClient):
    """A client that shows the token, and trusts one certificate."""

    def __init__(self, url: str, token: str, certificate: str, retry_delay: float = 3) -> None:
        if not url.startswith("wss://"):
            raise ValueError("the URL must begin with wss:// or everybody can read the token")
        super().__init__(url, retry_delay)
        self.token = token
        self.trust = ssl.create_default_context(cafile=certificate)

    def request(self, url: str) -> HTTPRequest:
        request = super().request(url)
        request.headers["Authorization"] = f"Bearer {self.token}"
        request.ssl_options = self.trust
        return request


async def serve_privately(options: argparse.Namespace, token: str) -> None:
    """Toss a coin, and serve it to those who have the token, until cancelled."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(options.certificate, options.key)
    PrivateServer.token = token
    app = make_app(PrivateServer)
    coin = RandomBernoulli(0.72)
    PeriodicCallback(lambda: PrivateServer.send_message([coin.sample()]), 100).start()
    await serve(app, options.port, options.address, context)


def main() -> None:
    """Serve or follow, as the command line says."""
    parser = argparse.ArgumentParser(description="A private stream.")
    roles = parser.add_subparsers(dest="role", required=True)
    server, client = roles.add_parser("server"), roles.add_parser("client")
    for role in server, client:
        role.add_argument("certificate")
    server.add_argument("key")
    server.add_argument("--address", default="localhost", help="to listen on (%(default)s)")
    server.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    client.add_argument("url")
    options = parser.parse_args()
    try:
        token = read_token()
        if options.role == "server":
            run(serve_privately(options, token))
        else:
            watch(PrivateClient(options.url, token, options.certificate))
    except (OSError, ValueError) as error:  # such as a certificate that is not there
        parser.error(str(error))


if __name__ == "__main__":
    main()
