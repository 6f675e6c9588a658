"""The posterior, the messages, the client's rule and its waits, without a network.

The rule: each sample is handed over once and in order; what a later offset leaves out is missed.
"""

import asyncio
import math
import random
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

from tornado.httpclient import HTTPRequest

from client import BetaBinomial, Messages, WebSocketClient, parse
from tests.support import PATIENCE, SEED, QuietCase, message


class BetaBinomialTests(unittest.TestCase):
    def test_known_answer(self) -> None:
        """A flat prior and 1, 1, 0, 1: Beta(1 + 3, 1 + 1), mean 4/6, variance 4*2 / (6*6*7)."""
        posterior = BetaBinomial().update([1, 1]).update([0, 1])
        self.assertEqual(posterior, BetaBinomial(alpha=4, beta=2))
        self.assertAlmostEqual(posterior.mean, 4 / 6, places=15)
        self.assertAlmostEqual(posterior.sd, math.sqrt(8 / 252), places=15)
        self.assertEqual(str(posterior), "Beta(4, 2)  mean 0.6667  sd 0.1782")

    def test_refuses_anything_but_0_and_1(self) -> None:
        """The ValueError shows what has come, and is short."""
        bad: list[Any] = [2, -1, 0.5, "1", None, [1], {}, math.nan]
        for sample in bad:
            with self.subTest(sample=sample):
                with self.assertRaises(ValueError) as raised:
                    BetaBinomial().update([1, sample, 0] * 1_000)
                self.assertIn(f"[1, {sample!r}, 0, 1, ", str(raised.exception))
                self.assertLess(len(str(raised.exception)), 150)

    def test_density(self) -> None:
        """It is flat for the prior; later it is highest at the share of ones."""
        self.assertEqual(BetaBinomial().density(12), "█" * 12)
        for ones, trials in ((0, 9), (9, 9), (3, 4), (720_000, 1_000_000)):
            picture = BetaBinomial(1 + ones, 1 + trials - ones).density(40)
            self.assertEqual(picture[min(40 * ones // trials, 39)], "█")
            self.assertLess(picture.count("█"), 20)

    def test_line_of_a_client(self) -> None:
        """After a million samples, picture, numbers and `missed` have 77 columns."""
        client = WebSocketClient("ws://localhost/")
        client.posterior, client.missed = BetaBinomial(720_001, 280_001), 7
        numbers = "Beta(720001, 280001)  mean 0.7200  sd 0.0004  missed 7"
        self.assertEqual(str(client), f"▕{14 * ' '}█{5 * ' '}▏ {numbers}")


class ParseTests(unittest.TestCase):
    def test_message(self) -> None:
        """It has an epoch, an offset, and a list of anything."""
        samples = [1, "a", None, {"price": 1.5}]
        self.assertEqual(parse(message(7, samples)), ("a", 7, samples))


class NewClientTests(unittest.TestCase):
    def test_url_that_can_never_work(self) -> None:
        """It is a ValueError at once, which shows no password."""
        bad = ["http://localhost/", "localhost:8765", "", "ws://", "ws://:80/", "ws:///websocket"]
        bad += ["ws://localhost:99999/", "ws://localhost:0/", "ws://localhost:abc/", "ws://[::1/"]
        bad += ["ws://alice:s3cret@localhost/", "ws://s3cret@localhost/"]
        for url in bad:
            with self.subTest(url=url):
                with self.assertRaises(ValueError) as raised:
                    WebSocketClient(url)
                self.assertNotIn("s3cret", str(raised.exception))

    def test_time_limits(self) -> None:
        """`request` allows 10 s for the connection, and 10 s for the whole handshake."""
        request = WebSocketClient("ws://localhost/").request("ws://localhost/")
        self.assertEqual((request.connect_timeout, request.request_timeout), (10, 10))


class FakeConnection:
    """A connection on which these messages have come; unless it stays open, it has ended then."""

    close_code: int | None = 1001
    close_reason: str | None = "going away"

    def __init__(self, *messages: str | bytes, stays_open: bool = False) -> None:
        self.messages = [*messages] if stays_open else [*messages, None]

    def begin(self, arrived: Messages) -> None:
        self.bring = arrived.put_nowait
        for one in self.messages:
            self.bring(one)

    def close(self, code: int) -> None:
        self.closed_with = code
        self.bring(None)


async def play(client: WebSocketClient, *connections: FakeConnection) -> None:
    """Let a client have these connections, one after the other, and then stop it."""
    left = list(connections)

    async def connect(_: HTTPRequest, arrived: Messages) -> FakeConnection:
        if not left:
            client.stop()
            await asyncio.Event().wait()  # until it takes effect
        connection = left.pop(0)
        connection.begin(arrived)
        return connection

    with mock.patch("client.connect", connect):
        async with asyncio.timeout(PATIENCE):
            await client.run()


class Call(NamedTuple):
    """What `on_message` was called with, and where the stream goes on after that."""

    samples: list[Any]
    epoch: str | None
    position: int
    missed: int


class Reacting(WebSocketClient):
    """A client that keeps its calls and the URLs that it asks for, and reacts as a test says."""

    def __init__(self) -> None:
        super().__init__("ws://localhost/", retry_delay=1e-9)
        self.calls: list[Call] = []
        self.urls: list[str] = []
        self.react: Callable[[list[Any]], Any] = lambda samples: None

    @property
    def place(self) -> tuple[str | None, int, int]:
        return self.epoch, self.position, self.missed

    def on_message(self, samples: list[Any]) -> Any:
        self.calls.append(Call([*samples], *self.place))
        return self.react(samples)

    def request(self, url: str) -> HTTPRequest:
        self.urls.append(url)
        return super().request(url)


class RuleCase(QuietCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = Reacting()

    async def play(self, *connections: FakeConnection) -> None:
        """Let the client of this test have these connections."""
        await play(self.client, *connections)

    async def receive(self, *messages: str | bytes) -> list[str]:
        """Let it have one connection with these messages; return its log up to the end of that."""
        with self.assertLogs("client", "WARNING") as logs:
            await self.play(FakeConnection(*messages))
        return [record.getMessage() for record in logs.records[:-1]]


class RuleTests(RuleCase):
    async def test_first_message(self) -> None:
        """It says where the client begins, nothing is missed, and the next one goes on there."""
        self.assertEqual(await self.receive(message(7, [1, 0]), message(9, [2])), [])
        self.assertEqual(self.client.calls, [Call([1, 0, 2], "a", 10, 0)])

    async def test_overlap_and_repeat(self) -> None:
        """What has come before is skipped, within a connection and after it."""
        first, again = message(3, [3, 4, 5]), message(4, [4, 5, 6])
        await self.play(FakeConnection(first, first, again), FakeConnection(message(6, [6, 7])))
        self.assertEqual(self.client.calls, [Call([3, 4, 5, 6], "a", 7, 0), Call([7], "a", 8, 0)])

    async def test_offset_that_goes_back(self) -> None:
        """Nothing is taken twice, nor what was before the first message of all."""
        await self.receive(message(8, [8, 9]), message(2, [2, 3]), message(6, [6, 7, 8, 9, 10]))
        self.assertEqual(self.client.calls, [Call([8, 9, 10], "a", 11, 0)])

    async def test_gap(self) -> None:
        """What a later offset leaves out is missed, and one line says so; no list has a gap."""
        log = await self.receive(message(0, [0]), message(9, [9]), message(10, [10]))
        self.assertEqual(self.client.calls, [Call([0], "a", 1, 0), Call([9, 10], "a", 11, 8)])
        self.assertEqual(log, ["missed 8 samples"])

    async def test_empty_message(self) -> None:
        """It says where the stream stands, also after a gap, and there is nothing to hand over."""
        log = await self.receive(message(5, []), message(9, []))
        self.assertEqual(log, ["missed 4 samples"])
        self.assertEqual((self.client.calls, self.client.place), ([], ("a", 9, 4)))

    async def test_new_epoch(self) -> None:
        """It begins at 0, nothing more is missed, and one line says where the last run was left."""
        log = await self.receive(message(0, []), message(30, [1]), message(0, [2], "b"))
        self.assertEqual(self.client.calls, [Call([1], "a", 31, 30), Call([2], "b", 1, 30)])
        anew = "the stream began anew; the last run was followed to 31"
        self.assertEqual(log, ["missed 30 samples", anew])

    async def test_new_epoch_with_a_later_offset(self) -> None:
        """Of the new run, all before its first offset is missed; a line for each of the two."""
        log = await self.receive(message(30, [1]), message(4, [2], "b"))
        self.assertEqual(self.client.calls, [Call([1], "a", 31, 0), Call([2], "b", 5, 4)])
        anew = "the stream began anew; the last run was followed to 31"
        self.assertEqual(log, [anew, "missed 4 samples"])

    async def test_state_that_was_set(self) -> None:
        """A client goes on from epoch, position, missed and posterior that its program has set."""
        self.client.epoch, self.client.position, self.client.missed = "a", 2, 7
        self.client.posterior = BetaBinomial(3, 1)
        self.client.react = lambda samples: WebSocketClient.on_message(self.client, samples)
        await self.receive(message(0, [1, 1, 0, 1]))
        self.assertEqual(self.client.urls[0], "ws://localhost/?epoch=a&offset=2")
        self.assertEqual(self.client.calls, [Call([0, 1], "a", 4, 7)])
        self.assertEqual(self.client.posterior, BetaBinomial(4, 2))


class OnMessageTests(RuleCase):
    """What one call of `on_message` gets, and what it may do with it."""

    async def test_what_came_while_it_was_busy(self) -> None:
        """What came while an `async def` awaited is one list; no list changes afterwards."""
        connection = FakeConnection(message(0, [0]), stays_open=True)
        kept = []

        async def react(samples: list[Any]) -> None:
            kept.append(samples)
            if len(kept) == 2:
                self.client.stop()
                return
            for number in 1, 2, 3:
                await asyncio.sleep(0)
                connection.bring(message(number, [number]))

        self.client.react = react
        await self.play(connection)
        self.assertEqual(self.client.calls, [Call([0], "a", 1, 0), Call([1, 2, 3], "a", 4, 0)])
        self.assertEqual(kept, [[0], [1, 2, 3]])

    async def test_changes_its_list(self) -> None:
        """Whatever it does to its list, the position is that after all of the samples."""
        self.client.react = list.clear
        await self.receive(message(0, [0, 1]), message(5, [5]))
        self.assertEqual(self.client.calls, [Call([0, 1], "a", 2, 0), Call([5], "a", 6, 3)])

    async def test_takes_a_part(self) -> None:
        """If it sets the position back and stops, the rest is not missed."""

        def take_two(samples: list[Any]) -> None:
            self.client.position -= len(samples) - 2
            self.client.stop()

        self.client.react = take_two
        await self.play(FakeConnection(message(0, [0, 1, 2, 3, 4]), message(9, [9])))
        self.assertEqual(self.client.place, ("a", 2, 0))

    async def test_stop(self) -> None:
        """No further call comes, though a gap, a new run or another connection is behind it."""
        gap, new_run = message(5, [5]), message(0, [0], "b")
        for behind in [gap], [new_run], []:
            self.client = Reacting()
            self.client.react = lambda samples: self.client.stop()
            await self.play(FakeConnection(message(0, [0]), *behind), FakeConnection(gap))
            self.assertEqual((len(self.client.calls), self.client.place), (1, ("a", 1, 0)))

    async def test_stop_while_it_awaits(self) -> None:
        """It is cancelled, and the position goes back, so that the next run has the same samples."""

        async def react(samples: list[Any]) -> None:
            self.client.stop()
            await asyncio.Event().wait()

        self.client.react = react
        await self.play(FakeConnection(message(3, [3, 4]), stays_open=True))
        self.assertEqual(self.client.place, ("a", 3, 0))


class FailureTests(RuleCase):
    def fail_once(self, samples: list[Any]) -> None:
        """Spoil the first list, and raise what could be taken for a connection that failed."""
        if len(self.client.calls) == 1:
            samples.clear()
            raise OSError("a full disk")

    async def fail_later(self, samples: list[Any]) -> None:
        await asyncio.sleep(0)
        self.fail_once(samples)

    async def be_cancelled(self, samples: list[Any]) -> None:
        """Await a task that was cancelled, which is no `stop`."""
        if len(self.client.calls) == 1:
            task = asyncio.create_task(asyncio.sleep(0))
            task.cancel()
            await task

    async def test_same_samples_again(self) -> None:
        """They come again, whatever was behind them; the log has the traceback."""
        news = message(3, [3, 4])
        followed = FakeConnection(news, message(9, [9]))
        for first in FakeConnection(news, stays_open=True), FakeConnection(news), followed:
            for react in self.fail_once, self.fail_later, self.be_cancelled:
                self.client = Reacting()
                self.client.react = react
                with self.assertLogs("client", "WARNING") as logs:
                    await self.play(first, FakeConnection(news))
                self.assertRegex(logs.output[0], "(?s)Traceback .*(a full disk|CancelledError)$")
                self.assertEqual(self.client.urls[1], "ws://localhost/?epoch=a&offset=3")
                self.assertEqual(self.client.calls, [Call([3, 4], "a", 5, 0)] * 2)

    async def test_generator(self) -> None:
        """An on_message with a `yield`, which would never run, is a TypeError in the log."""

        def generator(samples: list[Any]) -> Iterator[Any]:
            yield samples

        async def async_generator(samples: list[Any]) -> AsyncIterator[Any]:
            yield samples

        for react in generator, async_generator:
            self.client = Reacting()
            self.client.react = react
            with self.assertLogs("client", "WARNING") as logs:
                await self.play(FakeConnection(message(3, [3])))
            self.assertRegex(logs.output[0], "(?s)Traceback .*TypeError: ")
            self.assertEqual(self.client.place, ("a", 3, 0))


BAD: list[str | bytes] = [
    *("x", "", "[]", "{}", "null", "NaN", '"a\nb"', "[" * 100_000, b"\x00\xff"),
    message(2, [1]).encode(),  # which comes in a binary frame
    message(2, [1]).replace("2", "9" * 5_000),  # more digits than Python reads
    *(message(offset, [1]) for offset in ("2", None, True, 1.5, math.nan, -1)),
    *(message(2, samples) for samples in ("1", {"0": 1}, None, 1)),
    *(message(2, [1], epoch) for epoch in (1, None, ["a"])),
    '{"epoch": "a", "offset": 2}',
]


class ConnectionTests(RuleCase):
    async def test_message_that_cannot_be_understood(self) -> None:
        """One short line shows its beginning; it and what came after it are not taken."""
        for bad in BAD:
            self.client = Reacting()
            with self.subTest(bad=bad[:80]):
                with self.assertLogs("client", "WARNING") as logs:
                    await self.play(FakeConnection(message(0, [0]), bad, message(1, [1])))
                self.assertEqual(self.client.calls, [Call([0], "a", 1, 0)])
                self.assertIn(f"cannot understand {bad[:80]!r}; ", logs.output[0])

    async def test_connected(self) -> None:
        """`connected` is true from the handshake to the end, at which the client says 1000."""
        seen = []

        class Watched(Reacting):
            def request(self, url: str) -> HTTPRequest:  # before the handshake
                seen.append(self.connected)
                return super().request(url)

        self.client = Watched()
        self.client.react = lambda samples: seen.append(self.client.connected)
        first, second = FakeConnection(message(0, [0])), FakeConnection(message(1, [1]))
        await self.play(first, second)
        self.assertEqual(seen, [False, True, False, True, False])
        self.assertEqual((first.closed_with, second.closed_with), (1000, 1000))

    async def test_end(self) -> None:
        """The client waits until a connection that it closes has ended, and then tries again."""
        ended = []

        class Lingering(FakeConnection):
            def close(self, code: int) -> None:
                asyncio.get_running_loop().call_later(0.01, self.end)

            def end(self) -> None:
                ended.append(len(client.urls))
                self.bring(None)

        client = self.client
        await self.play(*[Lingering("nonsense", stays_open=True) for _ in range(3)])
        self.assertEqual(ended, [1, 2, 3])

    async def test_reason(self) -> None:
        """One line has the code and the reason that the server gives, if it gives any."""
        for code, reason in (1001, "going away"), (4000, "two\nlines"), (None, None):
            connection = FakeConnection()
            connection.close_code, connection.close_reason = code, reason
            with self.assertLogs("client", "WARNING") as logs:
                await self.play(connection)
            self.assertIn(f"{code} {reason!r}" if code else "lost", logs.output[0])
            self.assertNotIn("\n", logs.output[0])
            self.assertNotIn("None", logs.output[0])


class BackoffTests(QuietCase):
    async def waits(self, *connections: FakeConnection, **delay: float) -> list[float]:
        """Return how long a client sleeps after each of these connections."""
        waits: list[float] = []
        sleep = asyncio.sleep

        async def record(seconds: float) -> None:
            if seconds:  # 0 is not a wait: it lets the event loop turn
                waits.append(seconds)
            await sleep(0)

        client = WebSocketClient("ws://localhost/", **delay)
        with mock.patch("asyncio.sleep", record), self.assertLogs("client", "WARNING"):
            await play(client, *connections)
        return waits

    async def assert_waits(
        self, *connections: FakeConnection, limits: list[int], **delay: float
    ) -> None:
        """Assert that the waits of 100 clients are spread from 0 to these limits."""
        clients = [await self.waits(*connections, **delay) for _ in range(100)]
        for number, limit in enumerate(limits):
            waits = [client[number] for client in clients]
            self.assertLessEqual(max(waits), limit)
            # By chance, each of these would fail once in 10 ** 9 times.
            self.assertLess(min(waits), 0.2 * limit)
            self.assertGreater(max(waits), 0.8 * limit)

    async def test_limit_is_doubled(self) -> None:
        """Each failure doubles the limit, up to 30 s."""
        await self.assert_waits(*[FakeConnection()] * 6, limits=[3, 6, 12, 24, 30, 30])

    async def test_limit_returns(self) -> None:
        """It returns when the position has moved, or the epoch is new, as it is at first."""
        first, second = FakeConnection(message(0, [0])), FakeConnection(message(1, [1]))
        nothing = FakeConnection()
        await self.assert_waits(first, nothing, second, nothing, limits=[3, 6, 3, 6])
        old, new = FakeConnection(message(0, [])), FakeConnection(message(0, [], "b"))
        await self.assert_waits(old, old, old, new, new, limits=[3, 6, 12, 3, 6])

    async def test_limit_stays(self) -> None:
        """What cannot be understood, and what on_message refuses, does not make a wait short."""
        nonsense, bad_sample = FakeConnection("nonsense"), FakeConnection(message(0, [2]))
        connections = bad_sample, bad_sample, nonsense, bad_sample
        await self.assert_waits(*connections, limits=[3, 6, 12, 24])

    async def test_retry_delay(self) -> None:
        """It is the first limit, but none is above 30 s; it must be above 0."""
        await self.assert_waits(FakeConnection(), FakeConnection(), limits=[1, 2], retry_delay=1)
        await self.assert_waits(FakeConnection(), limits=[30], retry_delay=1_000)
        for delay in 0, -1, math.nan:
            with self.subTest(delay=delay), self.assertRaises(ValueError):
                WebSocketClient("ws://localhost/", delay)


class HistoryTests(RuleCase):
    async def test_random_histories(self) -> None:
        """Whatever 5,000 servers say in whatever order, each client takes and misses what it must."""
        asyncio.get_running_loop().set_debug(False)  # or it takes four times as long
        for number in range(5_000):
            await self.check_history(f"SEED={SEED}, history {number}")

    async def check_history(self, seed: str) -> None:
        """Compare what a client does with the rule. Each sample is its own number."""
        chance = random.Random(seed)
        messages, expected = [], []
        epoch, offset = "1", chance.choice((0, 1_000))
        position, missed = offset, 0  # where the rule says that a client is, and what it has missed
        for _ in range(chance.randrange(1, 20)):
            numbers = range(offset, offset + chance.choice((0, 1, 1, 2, 5, 30)))
            messages.append(message(offset, [*numbers], epoch))
            missed += max(0, offset - position)
            expected += [(epoch, number) for number in numbers if number >= position]
            position = max(position, numbers.stop)
            place = epoch, position, missed
            offset = numbers.stop
            if chance.random() < 0.4:
                offset = max(0, offset + chance.randrange(-40, 40))
            if chance.random() < 0.1:
                epoch, offset, position = epoch + "1", chance.choice((0, 0, 3, 40)), 0
        cut = chance.randrange(len(messages) + 1)
        self.client = Reacting()
        await self.play(FakeConnection(*messages[:cut]), FakeConnection(*messages[cut:]))
        taken = []
        for call in self.client.calls:
            first = call.position - len(call.samples)
            self.assertEqual(call.samples, [*range(first, call.position)], seed)  # without a gap
            taken += [(call.epoch, number) for number in call.samples]
        self.assertEqual((taken, self.client.place), (expected, place), seed)
