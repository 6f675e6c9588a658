"""The source, and the stream as a log that is appended to and read: without a network."""

import asyncio
import json
import math
import random
import unittest
from typing import Any
from unittest import mock

from server import RandomBernoulli, Stream
from tests.support import PATIENCE, QuietCase


class RandomBernoulliTests(unittest.TestCase):
    def test_refuses_what_is_no_probability(self) -> None:
        """A p outside 0..1, or nan, is a ValueError that names it."""
        for p in (-0.1, 1.1, math.nan, math.inf, -math.inf):
            with self.subTest(p=p), self.assertRaisesRegex(ValueError, str(p)):
                RandomBernoulli(p)

    def test_shows_1_with_probability_p(self) -> None:
        """The share of 1s is within six standard deviations of p."""
        coin, n = RandomBernoulli(0.72), 100_000
        ones = sum(coin.sample() for _ in range(n))
        self.assertLess(abs(ones - n * 0.72), 6 * math.sqrt(n * 0.72 * 0.28))

    def test_is_certain_at_0_and_at_1(self) -> None:
        """With p = 0 it never shows 1, and with p = 1 always, whatever the random number is."""
        for number in (0.0, math.nextafter(1, 0)):  # the ends of what random.random() returns
            with mock.patch("random.random", return_value=number):
                self.assertEqual([RandomBernoulli(p).sample() for p in (0, 1)], [0, 1])


class StreamCase(QuietCase):
    """A new stream, and what a client at a position is sent."""

    async def asyncSetUp(self) -> None:
        self.stream = Stream()

    async def append(self, samples: Any) -> None:
        """Append samples, and let the event loop turn, so that they are in the log."""
        self.stream.append(samples)
        await asyncio.sleep(0)

    def read(self, position: int) -> tuple[int, list[Any]]:
        """Return offset and samples of the next message; the position after it must fit them."""
        text, after = self.stream.read(position)
        message = json.loads(text)
        self.assertEqual(list(message), ["epoch", "offset", "samples"])
        self.assertEqual(message["epoch"], self.stream.epoch)
        self.assertEqual(message["offset"] + len(message["samples"]), after)
        return message["offset"], message["samples"]

    def messages(self) -> list[list[Any]]:
        """Return the samples of one message after another, from offset 0 to the end."""
        messages: list[list[Any]] = []
        position = 0
        while position < self.stream.end:
            offset, samples = self.read(position)
            self.assertEqual((offset, bool(samples)), (position, True))
            messages.append(samples)
            position += len(samples)
        return messages


class NewStreamTests(StreamCase):
    async def test_has_an_epoch_of_its_own(self) -> None:
        """It has 8 hex digits, which differ even where the random numbers are the same."""
        self.addCleanup(random.seed)
        random.seed(1)
        epoch = Stream().epoch
        random.seed(1)
        self.assertNotEqual(epoch, Stream().epoch)
        self.assertRegex(epoch, r"\A[0-9a-f]{8}\Z")

    async def test_has_sizes(self) -> None:
        """It keeps 10,000 samples, and puts at most 1,000 into a message."""
        self.assertEqual((self.stream.history_size, self.stream.message_size), (10_000, 1_000))

    def test_needs_an_event_loop(self) -> None:  # which does not run in a plain `def`
        """Where no event loop runs, making a stream raises RuntimeError."""
        self.assertRaises(RuntimeError, Stream)


class AppendTests(StreamCase):
    async def test_samples_are_in_the_log_at_the_next_turn(self) -> None:
        """The end moves when the event loop turns, by all samples in their order."""
        self.stream.append([1, 0])
        self.stream.append([])
        self.stream.append([2])
        self.assertEqual((self.stream.end, self.read(0)), (0, (0, [])))
        await asyncio.sleep(0)
        self.assertEqual((self.stream.end, self.read(0)), (3, (0, [1, 0, 2])))

    async def test_copies(self) -> None:
        """What the caller does to the samples afterwards does not change the log."""
        samples: list[Any] = [[1], 2]
        self.stream.append(samples)
        samples[0].append(3)
        samples.clear()
        await asyncio.sleep(0)
        self.assertEqual(self.read(0), (0, [[1], 2]))

    async def test_takes_whatever_json_can_hold(self) -> None:
        """A sample is any value of JSON, and comes out as it went in, also with commas inside."""
        plain: list[Any] = [1, -1.5, 10**30, True, None, "", "ä\u2028\ud800\n", []]
        commas = ["a, b", ", ", "], [", [1, 2], {"a": [None, {}], "b": 2}]
        for samples in (plain, commas, plain):
            await self.append(samples)
        self.assertEqual(repr(self.read(0)), repr((0, plain + commas + plain)))  # True is not 1
        self.assertEqual(self.read(len(plain) + 1)[1], commas[1:] + plain)

    async def refuses(self, error: type[Exception], *bad: Any) -> None:
        """Append each, which must be refused; nothing of it may be in the log afterwards."""
        for samples in bad:
            with self.subTest(samples=repr(samples)[:40]):
                self.assertRaises(error, self.stream.append, samples)
                await asyncio.sleep(0)
                self.assertEqual((self.stream.end, self.read(0)), (0, (0, [])))

    async def test_refuses_what_is_no_list(self) -> None:
        """A tuple, a text, a dict, one sample by itself: each is a TypeError."""
        await self.refuses(TypeError, (1, 0), "110", {"place": "roof"}, 1, None)

    async def test_refuses_what_json_cannot_hold(self) -> None:
        """One such sample, or one with such a thing inside, refuses the whole list."""
        await self.refuses(TypeError, [0, {1}], [0, b"bytes"], [0, [1j]])
        await self.refuses(ValueError, [0, math.nan], [0, math.inf], [{"a": -math.inf}])

    async def test_refuses_a_sample_that_is_too_long(self) -> None:
        """One that a client cannot take is a ValueError, alone and among others."""
        long = "x" * 9_999_999  # 10,000,001 bytes with its quotes
        await self.refuses(ValueError, [long], [1, [2, long], 3])

    async def test_in_another_thread(self) -> None:
        """What it appends is in the log, in order, and wakes who waits; it gets its own errors."""

        async def source() -> None:  # the thread may have an event loop of its own
            for number in range(100):
                self.stream.append([number])
            self.assertRaises(ValueError, self.stream.append, [math.nan])

        waiting = asyncio.create_task(self.stream.grown.wait())
        await asyncio.to_thread(asyncio.run, source())
        await asyncio.wait_for(waiting, PATIENCE)
        self.assertEqual(self.read(0), (0, [*range(100)]))

    async def test_wakes_every_task_that_waits(self) -> None:
        """Who waits for more goes on with the next samples, and not before."""
        for number in range(3):
            waiting = [asyncio.create_task(self.stream.grown.wait()) for _ in range(5)]
            for _ in range(3):  # turns of the event loop, in which a wrong wake-up would show
                await asyncio.sleep(0)
            self.assertFalse(any(task.done() for task in waiting))
            await self.append([number])
            await asyncio.wait_for(asyncio.gather(*waiting), PATIENCE)

    def test_after_its_event_loop(self) -> None:
        """Once the loop of the stream is closed, appending raises RuntimeError."""

        async def make() -> Stream:
            return Stream()

        self.assertRaises(RuntimeError, asyncio.run(make()).append, [1])


class ReadTests(StreamCase):
    async def test_from_each_position(self) -> None:
        """A message begins at the position, even at the end, or else at the oldest sample."""
        self.stream.history_size = 10
        await self.append([*range(15)])
        for position in range(16):
            first = max(5, position)
            self.assertEqual(self.read(position), (first, [*range(first, 15)]))

    async def test_history_size(self) -> None:
        """The newest samples are kept, whether they came one by one or all at once."""
        self.stream.history_size = 5
        for samples in ([0], [1], [2, 3, 4, 5, 6], [7], [*range(8, 20)]):
            await self.append(samples)
            end = samples[-1] + 1
            self.assertEqual(self.read(0)[1], [*range(max(0, end - 5), end)])
        self.assertEqual(len(self.stream.history), 5)

    async def test_history_size_of_0(self) -> None:
        """A message has no samples then, and its offset tells how many are gone."""
        self.stream.history_size = 0
        await self.append([1, 2, 3])
        self.assertEqual(self.read(0), (3, []))

    async def test_message_size(self) -> None:
        """A message has at most so many samples, but one at least; the next goes on after it."""
        self.stream.message_size = 4
        await self.append([*range(10)])
        self.assertEqual(self.messages(), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]])
        self.stream.message_size = 0
        await self.append([10])
        self.assertEqual(self.messages(), [[number] for number in range(11)])

    async def test_long_samples_come_fewer_at_a_time(self) -> None:
        """A message has about 64 kB at most, and all but the last have about half of that or more."""
        await self.append(["x" * 1_500] * 1_000)
        sizes = [len(json.dumps(samples)) for samples in self.messages()]
        self.assertLess(max(sizes), 66_000)  # 64,000 and the commas
        self.assertGreater(min(sizes[:-1]), 31_000)

    async def test_longer_samples_come_alone(self) -> None:
        """Each of more than 64 kB is a message, also when there are short ones around it."""
        await self.append([0, "x" * 100_000, "y" * 100_000, 2])
        self.assertEqual([len(samples) for samples in self.messages()], [1, 1, 1, 1])
