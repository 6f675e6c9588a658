"""The client counts every sample once, and comes back from whatever happens to its connection."""

import asyncio
import contextlib
import gc
import io
import json
import logging
import math
import os
import random
import re
import signal
import socket
import sys
import threading
import unittest
import warnings
from collections.abc import AsyncGenerator, Callable, Generator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from tornado.httpclient import HTTPRequest
from tornado.testing import gen_test
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketHandler

from client import BetaBinomial, WebSocketClient, main, watch
from tests.support import PairCase, Recorder, until, wait_until

FDS = Path("/proc/self/fd")


class BetaBinomialTests(unittest.TestCase):
    def test_known_answer(self) -> None:
        """A flat prior and 1, 1, 0, 1 give Beta(4, 2): mean 4/6, variance 4*2 / (6*6*7) = 2/63."""
        posterior = BetaBinomial().update([1, 1, 0, 1])
        self.assertEqual(posterior, (4, 2))
        self.assertAlmostEqual(posterior.mean, 4 / 6, places=15)
        self.assertAlmostEqual(posterior.sd, math.sqrt(2 / 63), places=15)
        self.assertEqual(str(posterior), "Beta(4, 2)  mean 0.6667  sd 0.1782")
        self.assertEqual(BetaBinomial().update([1, 1]).update([0]).update([1]), posterior)

    def test_flat_prior(self) -> None:
        """Before any sample it is Beta(1, 1): mean 1/2, sd sqrt(1/12)."""
        self.assertEqual((BetaBinomial(), BetaBinomial().mean), ((1, 1), 0.5))
        self.assertAlmostEqual(BetaBinomial().sd, math.sqrt(1 / 12), places=15)

    def test_refuses_anything_but_0_and_1(self) -> None:
        """The ValueError says what is expected and what came, cut to 80 characters."""
        bad: list[Any] = [2, -1, 0.5, "1", None, [1], {}, math.nan]
        for sample in bad:
            text = re.escape(f"samples must be 0 or 1, not {[1, sample, 0]!r}")
            with self.subTest(sample=sample), self.assertRaisesRegex(ValueError, f"^{text}$"):
                BetaBinomial().update([1, sample, 0])
        with self.assertRaisesRegex(ValueError, r"not .{80}$"):
            BetaBinomial().update([2] * 1_000)

    def test_density_is_highest_at_the_mode(self) -> None:
        """The picture is flat for the prior, and peaks in the column that holds the mode."""
        self.assertEqual(BetaBinomial().density(12), "█" * 12)
        for ones, trials in ((0, 9), (9, 9), (3, 4), (720_000, 1_000_000)):
            picture = BetaBinomial(1 + ones, 1 + trials - ones).density(40)
            self.assertEqual(len(picture), 40)
            self.assertEqual(picture[min(int(40 * ones / trials), 39)], "█")
        self.assertEqual(BetaBinomial(720_001, 280_001).density(20).count(" "), 19)

    def test_the_line(self) -> None:
        """str(client) is a picture of 20 characters, then the numbers, within 80 columns."""
        client = WebSocketClient("ws://localhost/")
        self.assertEqual(str(client), f"▕{'█' * 20}▏ Beta(1, 1)  mean 0.5000  sd 0.2887  missed 0")
        client.posterior = BetaBinomial(720_001, 280_001)
        self.assertRegex(str(client), r"^▕.{20}▏ Beta\(720001, 280001\)  mean 0.7200  sd 0.0004  ")
        self.assertLessEqual(len(str(client)), 80)


def message(offset: object, samples: object, epoch: object = "aaaaaaaa") -> str:
    return json.dumps({"epoch": epoch, "offset": offset, "samples": samples})


class ScriptedServer(WebSocketHandler):
    """A server whose nth connection sends the nth list of messages, and then waits or closes."""

    script: ClassVar[list[list[str | bytes | int]]]
    requests: ClassVar[list[str]]
    closed: ClassVar[list[int | None]]

    async def prepare(self) -> None:
        assert self.request.uri is not None
        self.requests.append(self.request.uri)
        if len(self.requests) > len(self.script):
            raise HTTPError(503, reason="the script is over")

    def open(self) -> None:
        for item in self.script[len(self.requests) - 1]:
            if isinstance(item, int):
                self.close(item)
            else:
                self.write_message(item, binary=isinstance(item, bytes))

    def on_close(self) -> None:
        self.closed.append(self.close_code)


class Placed(Recorder):
    """A recorder that keeps, for each call, where it was in the stream, and the samples."""

    def __init__(self, url: str = "ws://localhost/", retry_delay: float = 0.01) -> None:
        super().__init__(url, retry_delay)
        self.places: list[tuple[str | None, int, list[Any]]] = []

    def on_message(self, samples: list[Any]) -> None:
        self.places.append((self.epoch, self.position, samples))
        super().on_message(samples)


class Refusing(Recorder):
    """A recorder whose model knows 0 and 1 alone."""

    def on_message(self, samples: list[Any]) -> None:
        self.posterior = self.posterior.update(samples)
        super().on_message(samples)


class Dealer:
    """A connection without a network, on which whole groups of messages come at the same time."""

    close_code = close_reason = None

    def __init__(self, *groups: list[str]) -> None:
        self.groups = groups

    async def connect(
        self, request: HTTPRequest, on_message_callback: Callable[[Any], None], **_: Any
    ) -> "Dealer":
        self.put = on_message_callback
        self.dealing = asyncio.ensure_future(self.deal())
        return self

    async def deal(self) -> None:
        for group in self.groups:
            for item in group:
                self.put(item)
            for _ in range(2 * len(group) + 4):
                await asyncio.sleep(0)

    def close(self, code: int) -> None:
        self.put(None)

    async def follow(self, client: WebSocketClient) -> None:
        """Let the client take all groups, then cancel it, unless it has ended by itself."""
        with mock.patch("tornado.websocket.websocket_connect", self.connect):
            task = asyncio.ensure_future(client.run())
            await until(lambda: hasattr(self, "dealing") and self.dealing.done())
            task.cancel()
            await asyncio.wait([task])


class ClientCase(PairCase):
    """A scripted server, and a client that follows it."""

    def play(
        self, *script: list[str | bytes | int], client: type[Recorder] = Recorder
    ) -> type[ScriptedServer]:
        """Serve these connections one after the other; more of them get 503."""
        names = {"script": list(script), "requests": [], "closed": []}
        scripted = type("Played", (ScriptedServer,), names)
        self.client = client(f"ws://{self.serve(Application([('/', scripted)]))}/")
        self.follow(self.client)
        return scripted

    def tearDown(self) -> None:
        async def end() -> None:
            for task in self.following:
                task.cancel()
            await asyncio.gather(*self.following, return_exceptions=True)
            for server in self.others:
                await server.close_all_connections()
            for _ in range(10):  # or a handshake that is cut here has nobody to see its failure
                await asyncio.sleep(0.002)

        self.io_loop.run_sync(end)
        super().tearDown()

    def counts(self) -> tuple[int, int, int]:
        """Return how many samples came, position and missed."""
        return len(self.client.samples), self.client.position, self.client.missed


class RuleTests(ClientCase):
    @gen_test
    async def test_joins_without_a_query_and_resumes_with_its_position(self) -> None:
        """The first request has no query; every later one says epoch and position."""
        played = self.play([message(5, [1, 1, 0]), 1001], [message(8, []), 1001])
        await until(lambda: len(played.requests) > 2)
        resumed = "/?epoch=aaaaaaaa&offset=8"
        self.assertEqual(played.requests[:3], ["/", resumed, resumed])
        self.assertEqual(self.counts(), (3, 8, 0))

    @gen_test
    async def test_a_query_in_the_url_is_kept(self) -> None:
        """epoch and offset join what the URL's query says already."""
        played = self.play([message(0, [1]), 1001], [message(1, [])])
        self.client.url += "?token=x"
        await until(lambda: len(played.requests) > 1)
        self.assertEqual(played.requests[:2], ["/?token=x", "/?token=x&epoch=aaaaaaaa&offset=1"])

    @gen_test
    async def test_goes_on_from_what_was_set(self) -> None:
        """posterior, epoch, position and missed that were set before are gone on from."""
        client = WebSocketClient(self.url)
        self.server.send_message([0, 0, 1, 1])
        client.posterior, client.missed = BetaBinomial(3, 1), 7
        client.epoch, client.position = self.server.epoch, 2
        self.follow(client)
        await until(lambda: client.position == 4)
        self.assertEqual((client.posterior, client.missed), ((5, 1), 7))

    @gen_test
    async def test_first_message_ever_sets_the_position(self) -> None:
        """Samples before the first message were never promised; nothing is said of a new run."""
        with self.assertNoLogs("client", "WARNING"):
            self.play([message(1_000, [1])])
            await until(lambda: self.client.samples)
        self.assertEqual(self.counts(), (1, 1_001, 0))

    @gen_test
    async def test_new_epoch_is_said_and_counted_from_its_start(self) -> None:
        """A new run keeps the counts, misses what it has lost, and its line has the old end."""
        with self.assertLogs("client", "WARNING") as logs:
            self.play([message(7, [1, 0]), message(40, [1], "bbbbbbbb")])
            await until(lambda: self.client.epoch == "bbbbbbbb" and self.client.position == 41)
        self.assertEqual(self.counts(), (3, 41, 40))
        said = [record.getMessage() for record in logs.records]
        self.assertEqual(said[0], "the server began anew; its last run was followed to 9")
        self.assertEqual(said[1], "missed 40 samples, which had left the history")

    @gen_test
    async def test_jump_is_missed_and_said_once(self) -> None:
        """An offset beyond the position: the difference is missed, and one line says so."""
        with self.assertLogs("client", "WARNING") as logs:
            self.play([message(0, [1]), message(11, [1]), message(12, [1]), message(20, [])])
            await until(lambda: self.client.position == 20)
        self.assertEqual(self.counts(), (3, 20, 17))
        end = "samples, which had left the history"
        self.assertEqual(
            [r.getMessage() for r in logs.records], [f"missed {n} {end}" for n in (10, 7)]
        )

    @gen_test
    async def test_overlap_is_skipped(self) -> None:
        """Samples before the position have been counted; no call has an empty list."""
        played = self.play(
            [message(0, []), message(0, ["a", None]), message(0, ["a", None, {}]), 1000],
            [message(1, [None]), message(3, []), 1000],
            [message(2, [{}, 5]), message(0, ["a"])],
            client=Placed,
        )
        await until(lambda: len(played.requests) == 3 and self.client.position == 4)
        self.assertEqual(self.client.samples, ["a", None, {}, 5])
        assert isinstance(self.client, Placed)
        self.assertTrue(all(samples for _, _, samples in self.client.places))
        self.assertEqual(self.client.missed, 0)

    @gen_test
    async def test_position_during_on_message(self) -> None:
        """epoch and position are those of samples[0]: first, gathered, after a gap or restart."""
        client = Placed()
        await Dealer(
            [message(7, [0, 1]), message(9, [2]), message(8, [1, 2, 3])],
            [message(20, [4]), message(21, [5]), message(30, [6]), message(2, [7], "b")],
            [message(3, [8], "b"), message(4, [9], "b"), message(0, [10], "c")],
        ).follow(client)
        expected = [
            ("aaaaaaaa", 7, [0, 1, 2, 3]),
            ("aaaaaaaa", 20, [4, 5]),
            ("aaaaaaaa", 30, [6]),
            ("b", 2, [7]),
            ("b", 3, [8, 9]),
            ("c", 0, [10]),
        ]
        self.assertEqual(client.places, expected)
        self.assertEqual((client.epoch, client.position, client.missed), ("c", 1, 9 + 8 + 2))

    @gen_test
    async def test_random_histories(self) -> None:
        """2,000 histories with gaps, overlaps and restarts are counted as one by one, by hand."""
        for seed in range(2_000):
            rng = random.Random(seed)
            client = Placed()
            items, expected, spans = [], [], 0
            for epoch in "abc"[: rng.randint(1, 3)]:
                first = position = offset = rng.randint(0, 9) if epoch == "a" else 0
                for _ in range(rng.randint(1, 6)):
                    numbers = range(offset, offset + rng.randint(0, 5))
                    items.append(message(offset, [f"{epoch}{n}" for n in numbers], epoch))
                    position = max(position, offset)
                    for number in numbers:
                        if number == position:
                            expected.append(f"{epoch}{number}")
                            position += 1
                    offset = max(0, position + rng.choice([0, 0, 0, -1, -3, 1, 4]))
                spans += position - first
            cuts = sorted(rng.choices(range(len(items) + 1), k=3))
            groups = [items[a:b] for a, b in zip([0, *cuts], [*cuts, len(items)], strict=True)]
            with self.subTest(seed=seed):
                await Dealer(*groups).follow(client)
                self.assertEqual(client.samples, expected)
                self.assertEqual((client.epoch, client.position), (epoch, position))
                self.assertEqual(len(client.samples), spans - client.missed)
                for place, start, samples in client.places:
                    self.assertEqual(samples[0], f"{place}{start}")

    @gen_test
    async def test_what_has_come_is_handed_over_before_the_end(self) -> None:
        """The last message before a close is taken, though both come at the same time."""
        client, dealer = Recorder("ws://localhost/"), Dealer([message(0, [1]), message(1, [0])])
        dealer.groups[0].append(None)  # type: ignore[arg-type]
        await dealer.follow(client)
        self.assertEqual((client.samples, client.position), ([1, 0], 2))

    @gen_test
    async def test_position_moves_only_when_on_message_has_returned(self) -> None:
        """What on_message refuses is logged with its traceback and asked for again."""
        with self.assertLogs("client", "WARNING") as logs:
            again: list[str | bytes | int] = [message(1, [2, 0])]
            played = self.play([message(0, [1]), 1001], again, again, client=Refusing)
            await until(lambda: len(played.requests) > 3)
        self.assertEqual(played.requests[1:4], ["/?epoch=aaaaaaaa&offset=1"] * 3)
        self.assertEqual(self.counts(), (1, 1, 0))
        failed = [record for record in logs.records if record.exc_info]
        self.assertEqual([r.getMessage() for r in failed], ["on_message failed"] * 2)

    @gen_test
    async def test_coroutines_and_generators_are_refused(self) -> None:
        """An on_message that would run later is a TypeError with its traceback; a result is not."""

        class Coroutine(Recorder):
            async def on_message(self, samples: list[Any]) -> None:  # type: ignore[override]
                self.samples += samples

        class Generating(Recorder):
            def on_message(self, samples: list[Any]) -> Generator[int]:  # type: ignore[override]
                yield 1

        class AsyncGenerating(Recorder):
            async def on_message(  # type: ignore[override]
                self, samples: list[Any]
            ) -> AsyncGenerator[int]:
                yield 1

        class Counting(Recorder):
            def on_message(self, samples: list[Any]) -> int:  # type: ignore[override]
                super().on_message(samples)
                return len(samples)

        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # never awaited
            for kind in (Coroutine, Generating, AsyncGenerating):
                with self.subTest(kind=kind), self.assertLogs("client", "ERROR") as logs:
                    played = self.play([message(3, [1])], client=kind)
                    await until(lambda played=played: len(played.requests) > 1)  # type: ignore[misc]
                    self.assertEqual(self.counts(), (0, 3, 0))
                    self.assertIn("Traceback", logs.output[0])
                    self.assertIn("TypeError: on_message must be no coroutine", logs.output[0])
                    del logs
                self.following[-1].cancel()
                await asyncio.wait(self.following)
                gc.collect()
        with self.assertNoLogs("client", "WARNING"):
            self.play([message(3, [1, 1])], client=Counting)
            await until(lambda: self.client.position == 5)

    @gen_test
    async def test_message_that_cannot_be_understood_changes_nothing(self) -> None:
        """One line with its beginning, nothing counted, the connection closed and tried again."""
        bad: list[Any] = ["x", "", "[]", "{}", "null", "NaN", "[" * 100_000, b"\x00\xff"]
        bad += [message(0, [1, 0]).encode()]
        bad += ['{"epoch": "aaaaaaaa", "offset": NaN, "samples": []}']
        bad += ['{"epoch": "aaaaaaaa", "offset": 1' + "0" * 5_000 + ', "samples": []}']
        bad += [message(offset, [1]) for offset in ("2", None, True, 1.5, -1)]
        bad += [message(2, samples) for samples in ("1", {"0": 1}, None)] + [message(2, [1], 1)]
        with (
            mock.patch("random.uniform", return_value=0.0),
            self.assertLogs("client", "WARNING") as logs,
        ):
            played = self.play([message(0, [1, 0]), 1001], *([item] for item in bad))
            await until(lambda: len(played.requests) > len(bad) + 1)
            await until(lambda: len(played.closed) == len(bad) + 1)
        self.assertEqual((self.counts(), self.client.epoch), ((2, 2, 0), "aaaaaaaa"))
        self.assertEqual(set(played.requests[1:]), {"/?epoch=aaaaaaaa&offset=2"})
        self.assertEqual(played.closed[1:], [1000] * len(bad))
        said = [record.getMessage() for record in logs.records][1 : len(bad) + 1]
        expected = [f"cannot understand {item[:80]!r}; next try in 0.0 s" for item in bad]
        self.assertEqual(said, expected)


class RetryTests(ClientCase):
    def setUp(self) -> None:
        super().setUp()
        # Tornado has a traceback for a handshake that it cannot accept.
        tornado = logging.getLogger("tornado.application")
        self.enterContext(mock.patch.object(tornado, "disabled", True))

    async def limits(
        self, count: int, *script: list[str | bytes | int], retry_delay: float = 3
    ) -> list[float]:
        """Return the limits of the first waits, none of which takes any time."""
        with (
            mock.patch("random.uniform", side_effect=[0.0] * (count - 1) + [1e6]) as uniform,
            self.assertLogs("client"),
        ):
            self.play(*script, client=Refusing)
            self.client.retry_delay = retry_delay
            await until(lambda: uniform.call_count >= count)
            await self.end()
        self.assertEqual({low for (low, _), _ in uniform.call_args_list}, {0})
        return [high for (_, high), _ in uniform.call_args_list][:count]

    async def end(self) -> None:
        """Cancel the client."""
        task = self.following.pop()
        task.cancel()
        await asyncio.wait([task])

    @gen_test
    async def test_wait_grows_until_a_message_is_taken(self) -> None:
        """The limit is doubled up to 30 s; a message, not a handshake, makes it retry_delay."""
        taken: list[str | bytes | int] = [message(0, [1]), 1001]
        limits = await self.limits(10, [1001], [1001], taken, [1001], [1001], ["x"])
        self.assertEqual(limits, [3, 6, 3, 6, 12, 24, 30, 30, 30, 30])

    @gen_test
    async def test_wait_is_at_most_30_s(self) -> None:
        """A retry_delay above 30 s is cut down to it at every try."""
        self.assertEqual(await self.limits(3, retry_delay=1e9), [30, 30, 30])

    @gen_test
    async def test_wait_grows_while_on_message_fails(self) -> None:
        """A message that on_message refuses is not taken."""
        refused: list[str | bytes | int] = [message(1, [2])]
        limits = await self.limits(5, [message(0, [1]), 1001], refused, refused, refused)
        self.assertEqual(limits, [3, 6, 12, 24, 30])

    @gen_test
    async def test_each_run_begins_with_retry_delay(self) -> None:
        """A client that is run again waits as it did at first."""
        with mock.patch("random.uniform", return_value=0.0) as uniform:
            self.play()
            await until(lambda: uniform.call_count > 2)
            await self.end()
            uniform.reset_mock()
            self.follow(self.client)
            await until(lambda: uniform.call_count > 1)
        self.assertEqual([c.args[1] for c in uniform.call_args_list][:2], [0.01, 0.02])

    @gen_test
    async def test_every_failure_is_one_try_and_one_line(self) -> None:
        """Garbage, refusals and bad handshakes: one try, one line, a wait."""
        ok = b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        for reply, reason in (
            (b"", "Stream closed"),
            (b"\0\xff garbage\r\n\r\n", "Stream is closed"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "Non-websocket response"),
            (b"HTTP/1.1 301 Moved\r\nLocation: ws://localhost/\r\n\r\n", "HTTP 301: Moved"),
            (b"HTTP/1.1 503 full\r\nContent-Length: 0\r\n\r\n", "HTTP 503: full"),
            (ok + b"Sec-WebSocket-Accept: wrong\r\n\r\n", "Stream is closed"),
            (b"HTTP/1.1 101 S\r\n\r\n", "Stream is closed"),
        ):
            connections = 0

            async def answer(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reply: bytes = reply
            ) -> None:
                nonlocal connections
                connections += 1
                await reader.readuntil(b"\r\n\r\n")
                writer.write(reply)
                writer.close()

            server = await asyncio.start_server(answer, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            with (
                self.subTest(reply=reply[:30]),
                self.assertLogs("client", "WARNING") as logs,
                # Tornado forgets to close the connection of a 101 that it does not accept.
                warnings.catch_warnings(action="ignore", category=ResourceWarning),
            ):
                self.follow(WebSocketClient(f"ws://127.0.0.1:{port}/", retry_delay=0.001))
                await until(lambda logs=logs: len(logs.output) >= 4)  # type: ignore[misc]
                await self.end()
                self.assertIn(len(logs.output), (connections, connections - 1))
                for line in logs.output:
                    pattern = rf"cannot connect: {re.escape(reason)}; next try in \d+\.\d s$"
                    self.assertRegex(line, pattern)
                gc.collect()
            server.close()

    @gen_test
    async def test_pings_and_the_bound_of_the_handshake(self) -> None:
        """The handshake is bounded at 10 s, and pings go out every 10 s."""
        failed = mock.AsyncMock(side_effect=OSError("not now"))
        with (
            mock.patch("tornado.websocket.websocket_connect", failed),
            self.assertLogs("client", "WARNING"),
        ):
            self.follow(Recorder(self.url))
            await until(lambda: failed.call_count > 1)
            await self.end()
        (request, *_), options = failed.call_args
        self.assertEqual((request.connect_timeout, request.request_timeout), (10, 10))
        self.assertEqual(options["ping_interval"], 10)

    @gen_test
    async def test_a_closed_connection_is_said_with_its_code(self) -> None:
        """The line for a closed connection has the code and the reason that the server gave."""
        client = Recorder(self.url)
        with self.assertLogs("client") as logs:
            self.follow(client)
            await until(lambda: client.epoch)
            await self.restart()
            await until(lambda: client.epoch == self.server.epoch)
        self.assertIn("connected to ws://", logs.output[0])
        self.assertIn("closed by the server: 1001 'going away'; next try in ", logs.output[1])

    def test_what_can_never_work_is_refused_at_once(self) -> None:
        """Such a URL or retry_delay is a ValueError or TypeError, which shows no password."""
        bad = ["http://localhost/", "localhost:8765", "", "ws://", "ws://:80/", "ws:///websocket"]
        bad += ["ws://localhost:99999/", "ws://localhost:0/", "ws://localhost:abc/", "ws://[::1/"]
        bad += ["ws://localhost/?x=\udcff", "ws://local\nhost/", "ws://alice:s3cret@localhost/"]
        bad += ["ws://s3cret@localhost/"]
        for url in bad:
            with self.subTest(url=url), self.assertRaises(ValueError) as raised:
                WebSocketClient(url)
            self.assertNotIn("s3cret", str(raised.exception))
        delays: list[Any] = [0, -1, math.nan, "3", None]
        for delay in delays:
            error = ValueError if isinstance(delay, (int, float)) else TypeError
            with self.subTest(delay=delay), self.assertRaises(error):
                WebSocketClient("ws://localhost/", delay)

    @gen_test
    async def test_the_log_has_no_secret(self) -> None:
        """A token in the URL or in a header, even a broken one, is in no line; one line a try."""

        class Token(Recorder):
            def request(self, url: str) -> HTTPRequest:
                return HTTPRequest(url, headers={"Authorization": "s3cret\n"})

        class Bug(Recorder):
            def request(self, url: str) -> HTTPRequest:
                raise KeyError("s3cret")

        for kind, reason in ((Token, r"\w+"), (Bug, "KeyError")):
            with self.subTest(kind=kind), self.assertLogs(level="INFO") as logs:
                self.follow(kind(self.url))
                await until(lambda logs=logs: len(logs.output) > 2)  # type: ignore[misc]
                await self.end()
            for line in logs.output:
                pattern = rf"^WARNING:client:cannot connect: {reason}; next try in \d\.\d s$"
                self.assertRegex(line, pattern)
                self.assertNotIn("s3cret", line)
        with self.assertLogs("client") as logs:
            client = Recorder(f"{self.url}?token=s3cret")
            self.follow(client)
            await until(lambda: client.epoch)
            await self.restart()
            await until(lambda: client.epoch == self.server.epoch)
        self.assertNotIn("s3cret", "".join(logs.output))


class Held(Placed):
    """A recorder whose on_message is held up until the test lets it go on."""

    def __init__(self, url: str, retry_delay: float = 0.01) -> None:
        super().__init__(url, retry_delay)
        self.inside, self.go_on = threading.Event(), threading.Event()

    def on_message(self, samples: list[Any]) -> None:
        self.inside.set()
        self.go_on.wait()
        super().on_message(samples)


class Stopping(Recorder):
    """A recorder that stops itself in on_message, and tries to start again."""

    refusal: RuntimeError | None = None

    def on_message(self, samples: list[Any]) -> None:
        super().on_message(samples)
        self.stop()
        try:
            self.start()
        except RuntimeError as error:
            self.refusal = error


class StoppingTask(Recorder):
    """A recorder that stops itself in on_message."""

    def on_message(self, samples: list[Any]) -> None:
        super().on_message(samples)
        self.stop()


class RunTests(ClientCase):
    @gen_test
    async def test_cancelling_closes_the_connection_with_1000(self) -> None:
        """run() that is cancelled says 1000 to the server, and takes nothing more."""
        played = self.play([message(0, [1])])
        await until(lambda: self.client.samples)
        task = self.following[0]
        task.cancel()
        await asyncio.wait([task])
        self.assertTrue(task.cancelled())
        await until(lambda: played.closed)
        self.assertEqual(played.closed, [1000])

    @gen_test
    async def test_cancelling_in_the_handshake_leaves_no_connection(self) -> None:
        """A handshake that is cancelled is not waited for, and closed once it is through."""
        opened, go_on = asyncio.Event(), asyncio.Event()

        class Slow(ScriptedServer):
            script: ClassVar[list[list[str | bytes | int]]] = [[message(0, [1])]]
            requests: ClassVar[list[str]] = ["/"]
            closed: ClassVar[list[int | None]] = []

            async def prepare(self) -> None:
                opened.set()
                await go_on.wait()

        client = Recorder(f"ws://{self.serve(Application([('/', Slow)]))}/")
        task = asyncio.ensure_future(client.run())
        await opened.wait()
        task.cancel()
        await asyncio.wait([task])
        go_on.set()
        await until(lambda: Slow.closed)
        self.assertEqual((Slow.closed, client.calls), ([1000], 0))

    @gen_test
    async def test_stop_in_on_message_of_a_task(self) -> None:
        """No call follows, though a gap and a new run have been read already."""
        for rest in (
            [[message(1, [2])]],
            [
                [message(5, [2]), message(0, [3], "b"), message(9, [4], "b")],
                [message(10, [5], "b")],
            ],
        ):
            client = StoppingTask("ws://localhost/")
            await Dealer([message(0, [1]), *rest[0]], *rest[1:]).follow(client)
            self.assertIn(client.samples, ([1], [1, 2]))
            self.assertEqual(client.calls, 1)
        self.assertEqual(client.position, 1)
        played = self.play([message(0, [1]), message(5, [2])], client=StoppingTask)
        await until(lambda: self.following[-1].done())
        await until(lambda: played.closed)
        self.assertEqual((played.closed, self.client.calls), ([1000], 1))


class ThreadTests(PairCase):
    def setUp(self) -> None:
        super().setUp()
        # Tornado leaves the socket of a broken handshake to the garbage collector.
        self.enterContext(warnings.catch_warnings(action="ignore", category=ResourceWarning))

    def begin(self, kind: type[Recorder] = Recorder) -> Any:
        """Start a client, and stop it at the end of the test."""
        client = kind(self.url)
        self.addCleanup(client.stop)
        client.start()
        return client

    async def halt(self, client: WebSocketClient) -> None:
        """Stop a client while this event loop goes on to serve it."""
        await asyncio.get_running_loop().run_in_executor(None, client.stop)

    @gen_test
    async def test_start_and_stop_may_be_called_again(self) -> None:
        """start() and stop() twice each change nothing more; a second start resumes."""
        client = self.begin()
        for count in (1, 2, 3):
            client.start()
            await until(lambda: self.server.clients)
            client.start()
            self.server.send_message([count])
            await until(lambda count=count: client.position == count)  # type: ignore[misc]
            self.assertEqual(len(self.server.clients), 1)
            await self.halt(client)
            client.stop()
            await until(lambda: not self.server.clients)
        self.assertEqual((client.samples, client.missed), ([1, 2, 3], 0))

    @gen_test
    async def test_start_and_stop_at_once(self) -> None:
        """stop() right after start() ends the thread, whatever it is doing; before, nothing."""
        threads = threading.active_count()
        Recorder(self.url).stop()
        for _ in range(20):
            await self.halt(self.begin())
        await until(lambda: not self.server.clients)
        self.assertLessEqual(threading.active_count(), threads + 20)
        self.assertFalse([t for t in threading.enumerate() if "_listen" in t.name])

    @gen_test
    async def test_stop_and_start_in_on_message(self) -> None:
        """stop() ends the client, and start() in its own thread is a RuntimeError."""
        for rest in ([(1, [1])], [(7, [1]), (9, [1])]):
            client = self.begin(Stopping)
            await until(lambda client=client: client.epoch)  # type: ignore[misc]
            (handler,) = self.server.clients
            sent = [message(0, [1], self.server.epoch)]
            sent += [message(offset, samples, self.server.epoch) for offset, samples in rest]
            for item in [*sent, message(0, [1], "another")]:
                handler.write_message(item)
            await until(lambda: not self.server.clients)
            await self.halt(client)
            self.assertEqual((client.calls, client.epoch), (1, self.server.epoch))
            self.assertRegex(str(client.refusal), "own thread")

    @gen_test
    async def test_slow_on_message_gets_the_rest_in_one_list(self) -> None:
        """What comes while on_message is held up is handed to one call."""
        client = self.begin(Held)
        self.server.send_message([0])
        await until(client.inside.is_set)
        (handler,) = self.server.clients
        for number in range(1, 100):
            await handler.write_message(message(number, [number], self.server.epoch))
        client.go_on.set()
        await until(lambda: client.position == 100)
        whole = [(self.server.epoch, 0, [0]), (self.server.epoch, 1, [*range(1, 100)])]
        self.assertEqual(client.places, whole)

    @gen_test
    async def test_stop_while_on_message_is_held_up(self) -> None:
        """The current call is the last, whatever has been read already."""
        client = self.begin(Held)
        self.server.send_message([0])
        await until(client.inside.is_set)
        (handler,) = self.server.clients
        for number in range(1, 100):
            await handler.write_message(message(10 * number, [number], self.server.epoch))
        stopping = asyncio.ensure_future(self.halt(client))
        await until(lambda: client._task is None)
        client.go_on.set()
        await stopping
        self.assertEqual((client.calls, client.position), (1, 1))

    def test_stop_ends_a_wait_at_once(self) -> None:
        """stop() ends a client that is waiting to try again, however long the wait."""
        client = Recorder("ws://no-such-host.invalid/")
        with mock.patch("random.uniform", return_value=1e9), self.assertLogs("client") as logs:
            client.start()
            wait_until(lambda: logs.output)
            client.stop()
        self.assertEqual(len(logs.output), 1)

    def test_start_leaves_the_callers_event_loop_alone(self) -> None:
        """After start() and stop() the calling thread has the event loop that it had before."""
        seen: list[asyncio.AbstractEventLoop] = []

        def caller() -> None:
            with contextlib.closing(asyncio.new_event_loop()) as loop:
                asyncio.set_event_loop(loop)
                client = Recorder("ws://no-such-host.invalid/")
                client.start()
                seen.extend([loop, asyncio.get_event_loop()])
                client.stop()
                seen.append(asyncio.get_event_loop())
                asyncio.set_event_loop(None)

        thread = threading.Thread(target=caller)
        thread.start()
        thread.join()
        self.assertEqual(seen, seen[:1] * 3)

    @unittest.skipUnless(FDS.exists(), "needs /proc")
    def test_stop_in_the_handshake_leaves_no_descriptor(self) -> None:
        """Five starts and stops in mid-handshake leave at most one descriptor more."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = Recorder(f"ws://127.0.0.1:{server.getsockname()[1]}/")
            gc.collect()
            before = len(os.listdir(FDS))
            for _ in range(5):
                client.start()
                connection, _ = server.accept()
                with connection:
                    connection.recv(1)
                    client.stop()
            self.assertLessEqual(len(os.listdir(FDS)), before + 1)

    def test_watch_and_main_leave_the_process_as_it_was(self) -> None:
        """Signals, standard output and the level of Tornado's log are the same afterwards."""

        def state() -> list[Any]:
            signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            return [*signals, sys.stdout, logging.getLogger("tornado.application").level]

        class Brief(Recorder):
            def request(self, url: str) -> HTTPRequest:
                self.stop()
                return super().request(url)

        with contextlib.redirect_stdout(io.StringIO()) as output, self.assertLogs() as logs:
            logging.getLogger("test").warning("a line, for there need not be another")
            before = state()
            with mock.patch("sys.argv", ["client.py", "--url", self.url]):
                main(Brief)
            with mock.patch("time.sleep", side_effect=KeyboardInterrupt):
                client = Recorder(self.url)
                watch(client)
            self.assertEqual(state(), before)
        self.assertTrue(logs.output)
        self.assertEqual(output.getvalue().splitlines()[-1], str(client))
        self.assertGreaterEqual(len(output.getvalue().splitlines()), 3)


class PairTests(PairCase):
    attributes: ClassVar[dict[str, Any]] = {"history_size": 100}

    async def up_to_date(self, *clients: WebSocketClient) -> None:
        def condition() -> bool:
            here = {(client.epoch, client.position) for client in clients}
            return here == {(self.server.epoch, self.server.end)}

        await until(condition)

    def client(self) -> WebSocketClient:
        client = WebSocketClient(self.url, 0.01)
        self.follow(client)
        return client

    @gen_test
    async def test_short_disconnect_loses_nothing(self) -> None:
        """A client that is back before its position leaves the history has missed nothing."""
        control = self.client()
        await self.up_to_date(control)
        (undisturbed,) = self.server.clients
        disturbed = self.client()
        for _ in range(20):
            await self.up_to_date(disturbed, control)
            self.server.send_message([0, 1, 1])
            for handler in self.server.clients - {undisturbed}:
                handler.close()
            self.server.send_message([1])
        await self.up_to_date(disturbed, control)
        self.assertEqual((disturbed.posterior, disturbed.missed), ((61, 21), 0))
        self.assertEqual((control.posterior, control.missed), ((61, 21), 0))

    @gen_test
    async def test_long_disconnect_is_counted_as_missed(self) -> None:
        """A client that comes back too late says exactly how many it missed, and goes on."""
        client = self.client()
        self.server.send_message([1] * 10)
        await self.up_to_date(client)
        self.following[0].cancel()
        await asyncio.wait(self.following)
        for _ in range(25):
            self.server.send_message([0] * 10)
        self.follow(client)
        await self.up_to_date(client)
        self.assertEqual((client.missed, client.posterior), (150, (11, 101)))

    @gen_test
    async def test_late_joiner(self) -> None:
        """It gets all of a history that is not full, and has missed nothing of a full one."""
        first = self.client()
        for sample in (1, 0, 1, 1) * 20:
            self.server.send_message([sample])
        late = self.client()
        await self.up_to_date(first, late)
        self.assertEqual((first.posterior, late.posterior), ((61, 21), (61, 21)))
        self.server.send_message([1] * 90)
        late = self.client()
        await self.up_to_date(late)
        self.assertEqual((late.posterior.alpha + late.posterior.beta - 2, late.missed), (100, 0))

    @gen_test
    async def test_restarted_server_is_followed_from_its_start(self) -> None:
        """After a restart the new run is counted from its beginning, and the counts are kept."""
        client = self.client()
        self.server.send_message([1] * 50)
        await self.up_to_date(client)
        for run in range(1, 4):
            await self.restart()
            self.server.send_message([0] * 20)
            await self.up_to_date(client)
            self.assertEqual(client.posterior, (51, 1 + 20 * run))
        self.assertEqual(client.missed, 0)


if __name__ == "__main__":
    unittest.main()
