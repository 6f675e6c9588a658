"""Links that break, dribble and lag, beside a healthy client that must notice nothing.

SEED repeats a failure; LONG_TESTS=1 takes the full time.
"""

import socket
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from unittest import mock

from tests.faults import TEXT, Proxy, frame, frame_head
from tests.scenarios import LONG, FaultCase, LosingServer, Pair, churn, more, scene, storm
from tests.support import Recorder, following, until


class LinkTests(FaultCase):
    """One client behind a link of which each test makes a bad one."""

    async def asyncSetUp(self) -> None:
        await super().asyncSetUp()
        self.scene = await self.enterAsyncContext(scene())
        self.proxy = Proxy(self.scene.url)
        self.addAsyncCleanup(self.proxy.aclose)
        self.client = Recorder(self.proxy.url)
        await self.enterAsyncContext(following(self.client))
        self.enterContext(self.scene.flowing())

    async def survives(self, *faults: Callable[[], Awaitable[None]]) -> None:
        """Let these happen, each after another number has come; in the end, none is lost."""
        for fault in faults:
            await more(self.client)
            await fault()
        self.proxy.whole()
        self.assert_each_once(await self.scene.count(self.client))

    async def test_reset(self) -> None:
        """A connection that is reset costs no sample."""
        await self.survives(*10 * [self.proxy.reset])

    async def test_closed_without_a_close_frame(self) -> None:
        """A connection that is closed without a Close frame costs no sample."""
        await self.survives(*10 * [self.proxy.close])

    async def test_cut_in_a_frame(self) -> None:
        """Half a message is not counted, and comes again."""
        await self.survives(*10 * [self.proxy.cut])

    async def test_stall(self) -> None:
        """A link that stands still, and is then reset, costs no sample."""
        await self.survives(*3 * [self.proxy.stall])

    async def test_trickle(self) -> None:
        """A slow link that breaks costs no sample."""
        self.proxy.trickle()
        self.scene.send(3_000)
        await self.survives(self.proxy.reset, self.proxy.cut)

    async def test_one_byte_segments(self) -> None:
        """A client gets every sample though each byte comes by itself."""
        self.proxy.bytewise()
        await self.survives(*10 * [self.proxy.cut])

    async def test_latency(self) -> None:
        """A late link that breaks costs no sample."""
        self.proxy.late()
        await self.survives(*4 * [self.proxy.reset])

    async def test_broken_frames_of_a_server(self) -> None:
        """A frame that breaks the rules, or announces 11 MiB, ends its connection, and no more."""
        opcode, text = frame(3, b"x", masked=False), frame(TEXT, b'["\xff"]', masked=False)
        huge = frame_head(TEXT, 11 * 2**20, masked=False)
        await self.survives(*(partial(self.proxy.forge, data) for data in (opcode, text, huge)))
        self.assertEqual(len(self.proxy.streams), 4)

    async def test_backlog_that_no_connection_lives_for(self) -> None:
        """A client that is far behind gets further on each connection, however short."""
        self.proxy.trickle()
        self.scene.send(9_000)
        for _ in range(3):
            await self.proxy.reset()
            before = self.client.position
            await until(lambda: self.proxy.passed == 0, lambda: self.proxy.passed)
            await until(lambda: self.proxy.passed > 10_000, lambda: self.proxy.passed)
            self.assertGreater(self.client.position, before)
        await self.survives()


class LocalhostTests(FaultCase):
    async def test_localhost(self) -> None:
        """A client finds a server that listens on only one of the addresses of localhost."""
        real = socket.getaddrinfo

        def resolve(host: str, *arguments: Any, **options: Any) -> list[Any]:
            hosts = ["::1", "127.0.0.1"] if host == "localhost" else [host]
            return [found for host in hosts for found in real(host, *arguments, **options)]

        self.enterContext(mock.patch("socket.getaddrinfo", resolve))
        for address in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
            async with scene(address=address) as here:
                port = here.url.split(":")[-1]  # with the path
                async with following(client := Recorder(f"ws://localhost:{port}")):
                    self.assert_each_once(await here.count(client))


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

    async def test_churn(self) -> None:
        """Clients that leave and come back get every number once."""
        self.assert_each_once(await churn(visits=100 if LONG else 10))


class PositiveControlTests(FaultCase):
    """The same with a server that loses numbers on purpose: it must show."""

    async def test_storm(self) -> None:
        """A storm shows what is lost."""
        count = await storm(Pair(LosingServer), clients=5, numbers=500, connections=3)
        self.assertRaises(AssertionError, self.assert_each_once, count)

    async def test_churn(self) -> None:
        """A churn shows what is lost."""
        count = await churn(Pair(LosingServer), clients=5, visits=10)
        self.assertRaises(AssertionError, self.assert_each_once, count)
