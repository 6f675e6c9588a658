"""Several servers behind one address, fed by one NATS JetStream stream.

You want it when one process is not enough, or must not be the only one: any server may die, and
its clients go on at another. It needs `pip install nats-py`, and nats-server, a program of its own
(https://nats.io/download/). One process samples, and any number of them serve:

    nats-server -js -a 127.0.0.1 &
    python -m tests.recipes.broker produce &
    python -m tests.recipes.broker serve --port 8001 &
    python -m tests.recipes.broker serve --port 8002 &

Or copy this file, put it beside server.py, and run `python broker.py produce` and so on. Ctrl-C
ends what has a terminal of its own, and `kill $(jobs -p)` all that a shell runs in the background,
as above.

NATS numbers and keeps the samples (in a folder in /tmp, or in the one that -sd names), so all
servers have the same log: an offset is a sequence number minus 1, and the epoch is made from the
time at which the stream "samples" was created. client.py needs no change.

Put a proxy in front of the servers. It must pass WebSockets on, try the next server when one is
dead, and keep the Host header, with which Tornado compares the origin of a page. Let its health
check be a TCP check, or add a page that answers 200: / answers 404, and /websocket answers 400 to
anything but a WebSocket. On several machines, give --broker and --address, and let only them reach
the broker: it asks for no password.

Its limits: there is one producer. While it is down nobody samples, and a second one would mix its
samples in. What it publishes must be JSON, or the servers end. They end, too, when the stream
was deleted or made anew: start all of them again then. A server that is behind the one that a
client comes from answers 400, and the client comes back after its usual wait. When the broker was
restarted, a server may need half a minute to go on.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import logging

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import StreamInfo
from nats.js.errors import ServiceUnavailableError

from server import RandomBernoulli, WebSocketServer, make_app, run, serve

log = logging.getLogger("server")


class StreamServer(WebSocketServer):
    """A server whose log is that of the broker's stream."""

    @classmethod
    def begin(cls, stream: StreamInfo) -> None:
        """Take over the epoch, and start with an empty history before the first sample."""
        cls.epoch = hashlib.sha256(str(stream.created).encode()).hexdigest()[:8]
        cls.end = max(stream.state.first_seq, 1) - 1  # a new stream says 0, but begins with 1

    @classmethod
    def take(cls, message: Msg) -> None:
        """Append a message of the stream; ValueError if it cannot be the next one."""
        offset = message.metadata.sequence.stream - 1
        if offset < cls.end:
            raise ValueError("the stream was made anew: start this server again")
        if offset > cls.end:  # the stream has dropped what is between: clients see a jump
            cls.history.clear()
            cls.end = offset
        cls.send_message([json.loads(message.data)])


async def say(error: Exception) -> None:
    """Log what the connection to the broker met, in one line instead of a traceback."""
    log.warning("broker: %s", error or repr(error))


async def connect(broker: str) -> Client:
    """Connect to the broker, and try again for ever, now and whenever the connection is lost."""
    return await nats.connect(broker, max_reconnect_attempts=-1, error_cb=say)


async def produce(broker: str) -> None:
    """Sample and publish until cancelled; a stream that is there already goes on."""
    async with await connect(broker) as connection:
        jetstream = connection.jetstream()
        await jetstream.add_stream(name="samples", max_msgs=WebSocketServer.history_size)
        coin = RandomBernoulli(0.72)
        while True:
            try:
                await jetstream.publish("samples", json.dumps(coin.sample()).encode())
            except nats.errors.Error as error:  # not again: it may have arrived all the same
                log.warning("a sample may be lost: %s", error)
            await asyncio.sleep(0.1)


async def feed_and_serve(broker: str, port: int, address: str) -> None:
    """Serve the stream until cancelled, once all of it that the broker holds is here."""
    async with await connect(broker) as connection:
        jetstream = connection.jetstream()
        stream = await jetstream.add_stream(name="samples", max_msgs=StreamServer.history_size)
        StreamServer.begin(stream)
        subscription = await jetstream.subscribe("samples", ordered_consumer=True)
        while StreamServer.end < stream.state.last_seq:
            StreamServer.take(await anext(subscription.messages))

        async def feed() -> None:
            while True:
                try:
                    StreamServer.take(await subscription.next_msg(timeout=5))
                except nats.errors.TimeoutError:  # silence: the stream's, or is it another one now?
                    with contextlib.suppress(nats.errors.TimeoutError, ServiceUnavailableError):
                        if (await jetstream.stream_info("samples")).created != stream.created:
                            raise ValueError("the stream was made anew: start this server again")

        async with asyncio.TaskGroup() as group:
            group.create_task(feed())
            await serve(make_app(StreamServer), port, address)


async def main() -> None:
    """Do what the command line says until cancelled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--broker", default="nats://localhost:4222", help="%(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("produce", help="sample, in exactly one process")
    server = commands.add_parser("serve", help="serve the samples, in any number of processes")
    server.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    server.add_argument("--address", default="localhost", help="to listen on (%(default)s)")
    options = parser.parse_args()
    problem: BaseException | None = None
    try:
        if options.command == "produce":
            await produce(options.broker)
        else:
            await feed_and_serve(options.broker, options.port, options.address)
    except* (OSError, ValueError, nats.errors.Error) as errors:
        problem = errors.exceptions[0]
    if problem:  # here, since an exit inside of except* would be put into a group as well
        parser.exit(1, f"{parser.prog}: error: {problem}\n")


if __name__ == "__main__":
    run(main())
