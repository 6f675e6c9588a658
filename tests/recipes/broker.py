"""Several servers behind one address, fed by one NATS JetStream stream.

    nats-server -js -a 127.0.0.1 &
    python -m tests.recipes.broker produce &
    python -m tests.recipes.broker serve --port 8001 &
    python -m tests.recipes.broker serve --port 8002 &

You want it when one process is not enough, or must not be the only one: any server may die, and
its clients go on at another. One process samples, and any number of them serve. Ctrl-C ends what
has a terminal of its own, and `kill $(jobs -p)` all that a shell runs in the background, as above.
It needs `pip install nats-py`, and nats-server, a program of its own (https://nats.io/download/).

NATS numbers and keeps the samples (in a folder in /tmp, or in the one that -sd names), so all
servers have the same log: an offset is a sequence number minus 1, and the epoch is made from the
time at which the stream "samples" was created. client.py needs no change.

Put a proxy in front of the servers. It must pass WebSockets on, try the next server when one is
dead, and keep the Host header, with which Tornado compares the origin of a page. Let its health
check be a TCP check, or add a page that answers 200: / answers 404, and /websocket answers 400 to
anything but a WebSocket. On several machines, give --broker and --address, and let only them reach
the broker: it asks for no password.

Its limits: there is one producer. While it is down nobody samples, and a second one would mix its
samples in. A message that is not JSON is a line in the log, and is sent as null, so that all numbers
stay right. When the stream "samples" was deleted or made anew, the servers end: start all of them
again then. A server that is behind the one that a client comes from answers 400, and the client comes
back after its usual wait. When the broker was restarted, a server may need half a minute to go on.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
from collections.abc import AsyncIterator

import nats
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.errors import ServiceUnavailableError

from server import RandomBernoulli, Stream, WebSocketServer, logger, make_app, run, serve

ANEW = "the stream was made anew: start this server again"


async def say(error: Exception) -> None:
    """Log what the connection to the broker met, in one line instead of a traceback."""
    logger.warning("broker: %s", error or repr(error))


@contextlib.asynccontextmanager
async def connected(broker: str) -> AsyncIterator[JetStreamContext]:
    """Connect to the broker, and again whenever the connection is lost; OSError if it refuses."""
    try:
        async with await nats.connect(broker, max_reconnect_attempts=-1, error_cb=say) as client:
            yield client.jetstream()
    except nats.errors.Error as error:
        raise OSError(f"broker: {error}") from error


async def produce(broker: str) -> None:
    """Toss a coin and publish, until cancelled; a stream that is there already goes on."""
    coin = RandomBernoulli(0.72)
    async with connected(broker) as jetstream:
        await jetstream.add_stream(name="samples", max_msgs=Stream.history_size)
        while True:
            try:
                await jetstream.publish("samples", json.dumps(coin.sample()).encode())
            except nats.errors.Error as error:  # not again: it may have arrived all the same
                logger.warning("a sample may be lost: %s", error)
            await asyncio.sleep(0.1)


async def feed(stream: Stream, broker: str, ready: asyncio.Event) -> None:
    """Append what the broker has, and what comes; `ready` says that the first part is done."""
    async with connected(broker) as jetstream:
        info = await jetstream.add_stream(name="samples", max_msgs=Stream.history_size)
        stream.epoch = hashlib.sha256(str(info.created).encode()).hexdigest()[:8]
        stream.end = max(info.state.first_seq, 1) - 1  # an empty stream says 0, but begins with 1
        subscription = await jetstream.subscribe("samples", ordered_consumer=True)
        while True:
            if stream.end >= info.state.last_seq:
                ready.set()
            try:
                await append(stream, await subscription.next_msg(timeout=5))
            except nats.errors.TimeoutError:  # silence of the stream, or is it another one now?
                with contextlib.suppress(nats.errors.TimeoutError, ServiceUnavailableError):
                    if (await jetstream.stream_info("samples")).created != info.created:
                        raise OSError(ANEW) from None


async def append(stream: Stream, message: Msg) -> None:
    """Append a message at the offset that the broker gives it, and wait until it is there."""
    offset = message.metadata.sequence.stream - 1
    if offset < stream.end:
        raise OSError(ANEW)
    if offset > stream.end:  # the broker has dropped what is between: clients see a jump
        stream.history.clear()
        stream.end = offset
    try:
        stream.append([json.loads(message.data)])
    except (ValueError, RecursionError) as error:
        logger.warning("sample %d is sent as null: %s", offset, error)
        stream.append([None])
    await asyncio.sleep(0)


async def main() -> None:
    """Do what the command line says, until cancelled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--broker", default="nats://localhost:4222", help="%(default)s")
    roles = parser.add_subparsers(dest="role", required=True)
    roles.add_parser("produce", help="toss the coin, in exactly one process")
    server = roles.add_parser("serve", help="serve the samples, in any number of processes")
    server.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    server.add_argument("--address", default="localhost", help="to listen on (%(default)s)")
    options = parser.parse_args()
    if options.role == "produce":
        await produce(options.broker)
        return
    app, ready = make_app(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(feed(WebSocketServer.stream, options.broker, ready))
        await ready.wait()
        try:
            await serve(app, options.port, options.address)
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    run(main())
