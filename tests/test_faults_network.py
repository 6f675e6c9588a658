"""Links that break, dribble and lag, mostly beside a healthy client that must notice nothing.

SEED repeats a failure; LONG_TESTS=1 takes the full time.
"""

import asyncio
import contextlib
import random
import socket
import unittest
from collections.abc import Awaitable, Callable

from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port

from server import make_app
from tests.faults import BYTEWISE, LATE, SLOW, TEXT, TRICKLE, WHOLE, Proxy, frame
from tests.scenarios import OURS, Count, FaultCase, LosingServer, Pair, have, newest, scene, storm
from tests.support import LONG, Recorder, fast_runner, following, new_handler, until, url_at


async def more(client: Recorder) -> None:
    """Wait until a client has a number that it has not got yet."""
    await have(newest(client) + 1, client)


class CountTests(unittest.TestCase):
    def test_what_became_of_each_number(self) -> None:
        """Of 0 to 9, four are lost, of which the client has said one; two are not in order."""
        client = Recorder("ws://localhost/")
        client.samples, client.missed = [0, 1, 1, 2, 5, 4, 9], 1
        count = Count()
        count.add(client)
        self.assertEqual(count, Count(wanted=10, lost=4, doubled=2, unsaid=3))


class LinkTests(FaultCase):
    """One client behind a link of which each test makes a bad one."""

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.scene = await self.enterAsyncContext(scene())
        self.proxy = await self.enterAsyncContext(contextlib.aclosing(Proxy(self.scene.url)))
        self.client = Recorder(self.proxy.url)
        await self.enterAsyncContext(following(self.client))
        self.enterContext(self.scene.flowing())

    async def survives(self, *faults: Callable[[], Awaitable[None]]) -> None:
        """Let these happen, each after another number has come; in the end, none is lost."""
        for fault in faults:
            await more(self.client)
            await fault()
        self.proxy.pace = WHOLE
        self.assert_each_once(await self.scene.count(self.client))

    async def test_reset(self) -> None:
        """A connection that is reset costs no sample, also if it has stood still before."""
        await self.survives(*10 * [self.proxy.reset], *3 * [self.proxy.stall])

    async def test_closed_without_a_close_frame(self) -> None:
        """A connection that just ends costs no sample, also in the middle of a frame."""
        await self.survives(*10 * [self.proxy.drop, self.proxy.cut])

    async def test_slow_link(self) -> None:
        """A link that trickles, is late, or passes single bytes, and breaks, costs no sample."""
        for pace in (TRICKLE, LATE, BYTEWISE):
            self.proxy.pace = pace
            await self.survives(*3 * [self.proxy.reset, self.proxy.cut])

    async def test_broken_frames_of_a_server(self) -> None:
        """A frame that breaks the rules, or has more than 10 MiB, ends its connection, no more."""
        opcode, text = frame(3, b"x", masked=False), frame(TEXT, b'["\xff"]', masked=False)
        begin_of_11_mib = frame(TEXT, bytes(11 * 2**20), masked=False)[:100]
        for data in (opcode, text, begin_of_11_mib):
            await more(self.client)
            await self.proxy.forge(data)
        self.assert_each_once(await self.scene.count(self.client))
        self.assertEqual(len(self.proxy.streams), 4)

    async def test_backlog_longer_than_a_connection(self) -> None:
        """A client that is far behind gets further on each connection, of 10 kB here."""
        self.proxy.pace = TRICKLE
        self.scene.send(9_000)
        for _ in range(3):
            await self.proxy.reset()
            before, self.proxy.passed = self.client.position, 0
            await until(lambda: self.proxy.passed > 10_000, lambda: self.proxy.passed)
            self.assertGreater(self.client.position, before)
        await self.survives()


class LateJoinerTests(FaultCase):
    """A client that comes late, over a slow link, on a clock that runs faster."""

    def test_long_samples(self) -> None:
        """Samples of 20 kB come on one connection: no ping waits too long behind a message."""
        with fast_runner(10) as runner:
            runner.run(self.join())

    async def join(self) -> None:
        """Get samples for about 30 s: after 20 s, a ping without an answer ends a connection."""
        app = make_app(handler := new_handler())
        handler.send_message(["x" * 20_000] * 80)
        listener, port = bind_unused_port()
        # Otherwise the queue of the kernel may hold a ping back for 7 s.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        server = HTTPServer(app)
        server.add_socket(listener)
        async with contextlib.aclosing(Proxy(url_at(port))) as proxy:
            proxy.pace = SLOW
            async with following(client := Recorder(proxy.url)):
                await until(lambda: client.position == 80, lambda: client.position)
            self.assertEqual(len(proxy.streams), 1)
        server.stop()
        await until(lambda: not handler.clients)


class ManyClientsTests(FaultCase):
    """Clients that lose their connections again and again, or leave and come back."""

    numbers, connections = (20_000, 25) if LONG else (1_000, 2)

    async def test_flapping(self) -> None:
        """Clients whose connections break all the time get every number once."""
        count = await storm(numbers=self.numbers, connections=self.connections)
        self.assert_each_once(count)

    async def test_flapping_with_a_short_history(self) -> None:
        """What has left the history before a client is back is missed, and exactly that is said."""
        count = await storm(numbers=self.numbers, connections=self.connections, history_size=50)
        self.assertGreater(count.lost, 0)
        self.assertEqual((count.doubled, count.unsaid), (0, 0), count)

    async def test_positive_control_of_flapping(self) -> None:
        """With a server that loses numbers on purpose, the count finds them."""
        self.assert_found(await storm(Pair(LosingServer), numbers=500, connections=2))

    async def test_leaving_and_coming_back(self) -> None:
        """Clients that stop after a number, and go on later, get every number once."""
        self.assert_each_once(await self.churn(OURS, 20, visits=100 if LONG else 10))

    async def test_positive_control_of_leaving(self) -> None:
        """With a server that loses numbers on purpose, the count finds them."""
        self.assert_found(await self.churn(Pair(LosingServer), 5, visits=10))

    async def churn(self, pair: Pair, clients: int, visits: int) -> Count:
        """Let each client come and leave so many times, and count what it has got in the end."""

        async def visit(client: Recorder) -> None:
            for _ in range(visits):
                async with following(client):
                    await more(client)
                await asyncio.sleep(random.uniform(0, 0.1))  # away

        async with scene(pair) as here:
            visitors = [pair.client(here.url) for _ in range(clients)]
            with here.flowing():
                await asyncio.gather(*map(visit, visitors))
            async with following(*visitors):
                return await here.count(*visitors)
