"""A client that speaks: set the p of listening_server.py, with the key that it printed.

    python -m tests.recipes.set_p KEY 0.5

It ends by itself, as soon as the server has answered. It needs only Tornado. Its limit: other users
of your machine can read the key in the list of processes while this runs.
"""

import argparse
import asyncio
import contextlib
import sys

from tornado import httpclient, websocket


async def main() -> str | None:
    """Send key and p; return None, or what went wrong."""
    parser = argparse.ArgumentParser(description="Set the p of a server that listens.")
    parser.add_argument("key")
    parser.add_argument("p")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    if not options.url.startswith(("ws://", "wss://")):
        parser.error("the URL must begin with ws:// or wss://")
    try:
        connection = await websocket.websocket_connect(options.url)
    except (OSError, ValueError, httpclient.HTTPClientError) as error:
        return f"cannot connect: {error}"
    await connection.write_message(f"{options.key} {options.p}")
    connection.close(1000)
    while await connection.read_message() is not None:
        pass  # the stream goes on until the server has closed, too
    if connection.close_code == 1000:
        return None
    return f"refused: {connection.close_code} {connection.close_reason}"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
