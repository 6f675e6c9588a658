"""The client's rule, connecting and waiting, threads, and what `on_message` may rely on.

Faults of the network, false servers and random histories are left to test_faults.py.
"""

import asyncio
import contextlib
import gc
import io
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import unittest
import warnings
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any
from unittest import mock

from tornado.httpclient import HTTPRequest
from tornado.testing import gen_test
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketHandler

from client import BetaBinomial, WebSocketClient, watch
from tests.support import PairCase, Recorder, free_port, until

FDS = Path("/proc/self/fd")
Item = str | bytes | int | None  # a message, a code to close with, or None for a connection cut


class BetaBinomialTests(unittest.TestCase):
    def test_known_answers(self) -> None:
        """Flat it has mean 1/2, variance 1/12; with 1, 1, 0, 1: 4/6 and 4*2 / (6*6*7) = 2/63."""
        for samples, counts, mean, variance, text in (
            ([], (1, 1), 1 / 2, 1 / 12, "Beta(1, 1)  mean 0.5000  sd 0.2887"),
            ([1, 1, 0, 1], (4, 2), 4 / 6, 2 / 63, "Beta(4, 2)  mean 0.6667  sd 0.1782"),
        ):
            posterior = BetaBinomial().update(samples[:2]).update(samples[2:])
            self.assertEqual((posterior, str(posterior)), (counts, text))
            self.assertAlmostEqual(posterior.mean, mean, places=15)
            self.assertAlmostEqual(posterior.sd, math.sqrt(variance), places=15)

    def test_refuses_anything_but_0_and_1(self) -> None:
        """The ValueError says what is expected and what came, cut to 80 characters."""
        bad: list[Any] = [2, -1, 0.5, "1", None, [1], {}, math.nan]
        for sample in bad:
            text = re.escape(f"samples must be 0 or 1, not {[1, sample, 0]!r}")
            with self.subTest(sample=sample), self.assertRaisesRegex(ValueError, f"^{text}$"):
                BetaBinomial().update([1, sample, 0])
        with self.assertRaisesRegex(ValueError, r"not .{80}$"):
            BetaBinomial().update([2] * 1_000)

    def test_picture(self) -> None:
        """It is flat for the prior and peaks at the mode; the whole line fits 80 columns."""
        self.assertEqual(BetaBinomial().density(12), "█" * 12)
        for ones, trials in ((0, 9), (9, 9), (3, 4), (720_000, 1_000_000)):
            picture = BetaBinomial(1 + ones, 1 + trials - ones).density(40)
            self.assertEqual(len(picture), 40)
            self.assertEqual(picture[min(int(40 * ones / trials), 39)], "█")
        client = WebSocketClient("ws://localhost/")
        client.posterior, client.missed = BetaBinomial(720_001, 280_001), 7
        numbers = "Beta(720001, 280001)  mean 0.7200  sd 0.0004  missed 7"
        self.assertEqual(str(client), f"▕{14 * ' '}█{5 * ' '}▏ {numbers}")
        self.assertLessEqual(len(str(client)), 80)


def message(offset: object, samples: object, epoch: object = "a") -> str:
    return json.dumps({"epoch": epoch, "offset": offset, "samples": samples})


class Stub(Recorder):
    """A recorder that keeps where each call was, and first reacts as a test tells it to."""

    def __init__(self, url: str, retry_delay: float = 0.01) -> None:
        super().__init__(url, retry_delay)
        self.places: list[tuple[str | None, int, list[Any]]] = []
        self.react: Callable[[list[Any]], Any] = len  # whose result is ignored

    def on_message(self, samples: list[Any]) -> Any:
        result = self.react(samples)
        self.places.append((self.epoch, self.position, samples))
        super().on_message(samples)
        return result

    async def reach(self, *place: object) -> None:
        """Wait until epoch, position and missed are these."""
        await until(lambda: (self.epoch, self.position, self.missed) == place)


class Play:
    """A server whose nth connection sends the nth list of items, and a client of it."""

    def __init__(self, case: PairCase, *script: list[Item], query: str = "") -> None:
        self.script = script  # further connections get 503
        self.requests: list[str | None] = []
        self.closed: list[int | None] = []  # the codes that the client gave
        self.handler: Actor | None = None  # of the newest connection
        self.may_connect = asyncio.Event()
        self.may_connect.set()
        address = case.serve(Application([("/", Actor, {"play": self})]))
        self.client = Stub(f"ws://{address}/{query}")

    async def requested(self, count: int) -> None:
        """Wait until the client has made so many requests."""
        await until(lambda: len(self.requests) >= count)

    async def ended(self, count: int = 1) -> None:
        """Wait until so many connections have been closed."""
        await until(lambda: len(self.closed) >= count)

    def say(self, *items: Item) -> None:
        """Send all at the same time."""
        assert self.handler and self.handler.ws_connection and self.handler.ws_connection.stream
        for item in items:
            if item is None:
                self.handler.ws_connection.stream.close()
            elif isinstance(item, int):
                self.handler.close(item, "over")
            else:
                self.handler.write_message(item, binary=isinstance(item, bytes))


class Actor(WebSocketHandler):
    def initialize(self, play: Play) -> None:
        self.play = play

    async def prepare(self) -> None:
        self.play.requests.append(self.request.uri)
        if len(self.play.requests) > len(self.play.script):
            raise HTTPError(503, reason="no more")
        await self.play.may_connect.wait()

    def open(self) -> None:
        self.play.handler = self
        self.play.say(*self.play.script[len(self.play.requests) - 1])

    def on_close(self) -> None:
        self.play.closed.append(self.close_code)


class ClientCase(PairCase):
    async def end(self) -> None:
        """Cancel the client that was followed last."""
        self.following[-1].cancel()
        await asyncio.wait(self.following[-1:])

    def begin(self, client: WebSocketClient) -> None:
        """Start a client, and stop it at the end of the test."""
        self.addCleanup(client.stop)
        client.start()


class RuleTests(ClientCase):
    @gen_test
    async def test_counts_each_sample_once(self) -> None:
        """Gaps are missed, overlaps skipped, and each call has what came without a gap."""
        play = Play(self, [])
        client = play.client
        with self.assertLogs("client", "WARNING") as logs:
            self.follow(client)
            await until(lambda: play.handler)
            for items, place in (
                ([message(7, [0, 1]), message(9, [2]), message(9, [])], ("a", 10, 0)),
                ([message(7, [0]), message(8, [1, 2, {}]), message(20, [4])], ("a", 21, 9)),
                ([message(21, [5]), message(30, [6]), message(2, [7], "b")], ("b", 3, 19)),
                ([message(3, [8], "b"), message(4, [9], "b"), message(0, [10], "c")], ("c", 1, 19)),
                ([message(0, [10], "c"), message(5, [], "c")], ("c", 5, 23)),
            ):
                play.say(*items)
                await client.reach(*place)
        expected = [("a", 7, [0, 1, 2]), ("a", 10, [{}]), ("a", 20, [4]), ("a", 21, [5])]
        expected += [("a", 30, [6]), ("b", 2, [7]), ("b", 3, [8, 9]), ("c", 0, [10])]
        self.assertEqual(client.places, expected)
        missed = "missed {} samples, which had left the history"
        anew = "the server began anew; its last run was followed to {}"
        lines = [missed.format(9), missed.format(8), anew.format(31), missed.format(2)]
        lines += [anew.format(5), missed.format(4)]
        self.assertEqual([record.getMessage() for record in logs.records], lines)

    @gen_test
    async def test_resumes_at_its_position(self) -> None:
        """The URL's own query alone comes first, then epoch and position, too; no log has it."""
        for query, and_so in (("", "?"), ("?token=s3cret", "?token=s3cret&")):
            play = Play(self, [message(5, [1, 1, 0]), 1001], [message(8, []), 1001], query=query)
            with self.assertLogs("client", "INFO") as logs:
                self.follow(play.client)
                await play.requested(3)
                await self.end()
            resumed = f"/{and_so}epoch=a&offset=8"
            self.assertEqual(play.requests[:3], [f"/{query}", resumed, resumed])
            self.assertRegex(logs.output[0], r"^INFO:client:connected to ws://[\d.:]+/$")
            self.assertIn("closed by the server: 1001 'over'; next try in 0.0 s", logs.output[1])
            self.assertNotIn("s3cret", "".join(logs.output))

    @gen_test
    async def test_goes_on_from_what_was_set(self) -> None:
        """It goes on from posterior, epoch, position and missed, set or of a run that has ended."""
        client = WebSocketClient(self.url)
        self.server.send_message([0, 0, 1, 1])
        client.posterior, client.missed = BetaBinomial(3, 1), 7
        client.epoch, client.position = self.server.epoch, 2
        self.follow(client)
        await until(lambda: client.position == 4)
        await self.end()
        self.begin(client)
        self.server.send_message([0])
        await until(lambda: client.position == 5)
        self.assertEqual((client.posterior, client.missed), ((5, 2), 7))
        await asyncio.to_thread(client.stop)

    @gen_test
    async def test_what_has_come_is_handed_over_before_the_end(self) -> None:
        """The last message before the connection is cut is taken, though both come together."""
        play = Play(self, [message(0, [1]), message(5, [2]), None])
        with self.assertLogs("client", "WARNING") as logs:
            self.follow(play.client)
            await play.requested(2)
        self.assertEqual(play.requests[1], "/?epoch=a&offset=6")
        self.assertEqual(play.client.places, [("a", 0, [1]), ("a", 5, [2])])
        self.assertIn("connection lost; next try in", logs.output[1])

    @gen_test
    async def test_what_on_message_refuses_comes_again(self) -> None:
        """An exception, or a result that would run later: a traceback, and the same samples."""

        def send_elsewhere(samples: list[Any]) -> None:
            raise ConnectionAbortedError("another connection, of on_message itself")

        async def coroutine(samples: list[Any]) -> None:
            pass

        async def async_generator(samples: list[Any]) -> AsyncGenerator[int]:
            yield 1

        late = "TypeError: on_message must be no coroutine and no generator"
        cases: list[tuple[Callable[[list[Any]], Any], str]] = [
            (BetaBinomial().update, r"ValueError: samples must be 0 or 1, not \[2\]"),
            (send_elsewhere, "ConnectionAbortedError: another connection, of on_message itself"),
            (lambda samples: (sample for sample in samples), late),
            (coroutine, late),
            (async_generator, late),
        ]
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # never awaited
            for react, error in cases:
                play = Play(self, [message(3, [2])], [message(3, [2])])
                play.client.react = react
                with self.subTest(react=react), self.assertLogs("client", "WARNING") as logs:
                    self.follow(play.client)
                    await play.requested(3)
                    await self.end()
                    self.assertEqual(play.requests[1:3], ["/?epoch=a&offset=3"] * 2)
                    self.assertEqual(play.closed, [1000] * 2)
                    again = "WARNING:client:the same samples will come again; next try in "
                    for text, line in zip(logs.output[::2], logs.output[1::2], strict=False):
                        self.assertRegex(text, rf"(?s):on_message failed\nTraceback .*\n{error}$")
                        self.assertTrue(line.startswith(again), line)
                    del logs
                gc.collect()

    @gen_test
    async def test_message_that_cannot_be_understood_changes_nothing(self) -> None:
        """One line with its beginning, nothing counted, the connection closed and tried again."""
        bad: list[Any] = ["x", "", "[]", "{}", "null", "NaN", "[" * 100_000, b"\x00\xff"]
        bad += [message(0, [1, 0]).encode(), '{"epoch": "a", "offset": NaN, "samples": []}']
        bad += ['{"epoch": "a", "offset": 1' + "0" * 5_000 + ', "samples": []}']
        bad += [message(offset, [1]) for offset in ("2", None, True, 1.5, -1)]
        bad += [message(2, samples) for samples in ("1", {"0": 1}, None)] + [message(2, [1], 1)]
        play = Play(self, [message(0, [1, 0]), 1001], *([item] for item in bad))
        play.client.retry_delay = 1e-9
        with self.assertLogs("client", "WARNING") as logs:
            self.follow(play.client)
            await play.requested(len(bad) + 2)
            await play.ended(len(bad) + 1)
        self.assertEqual(play.client.places, [("a", 0, [1, 0])])
        self.assertEqual(set(play.requests[1:]), {"/?epoch=a&offset=2"})
        self.assertEqual(play.closed[1:], [1000] * len(bad))
        said = [record.getMessage() for record in logs.records][1 : len(bad) + 1]
        expected = [f"cannot understand {item[:80]!r}; next try in 0.0 s" for item in bad]
        self.assertEqual(said, expected)


class RetryTests(ClientCase):
    async def limits(self, client: WebSocketClient, count: int) -> list[float]:
        """Return the limits of the first waits of a run, none of which takes any time."""
        uniform = mock.patch("random.uniform", return_value=0.0)
        with uniform as drawn, self.assertLogs("client"):
            self.follow(client)
            await until(lambda: drawn.call_count >= count)
            await self.end()
        self.assertEqual({call.args[0] for call in drawn.call_args_list}, {0})
        return [call.args[1] for call in drawn.call_args_list][:count]

    @gen_test
    async def test_wait_grows_until_a_message_is_taken(self) -> None:
        """The limit is doubled up to 30 s; a message taken, or a new run, makes it retry_delay."""
        taken: list[Item] = [message(0, [1]), 1001]
        refused: list[Item] = [message(1, [2])]  # that is not taken, nor is a handshake
        cases: list[tuple[float, list[list[Item]], list[float]]] = [
            (3, [[1001], [1001], taken, [1001], ["x"]], [3, 6, 3, 6, 12, 24, 30, 30]),
            (3, [taken, refused, refused, refused], [3, 6, 12, 24, 30]),
            (3, [[1001], refused, [1001]], [3, 6, 12, 24]),
            (1e9, [], [30, 30, 30]),
        ]
        for delay, script, limits in cases:
            client = Play(self, *script).client
            client.retry_delay, client.react = delay, BetaBinomial().update
            self.assertEqual(await self.limits(client, len(limits)), limits)
            again = await self.limits(client, 2)
            self.assertEqual(again, [min(delay, 30), min(2 * delay, 30)])

    @gen_test
    async def test_why_it_cannot_connect_is_one_line_a_try(self) -> None:
        """The line has the reason; of what request raises, which may quote a token, the type."""
        token, bug = Stub(self.url), Stub(self.url)
        bad_header = HTTPRequest(self.url, headers={"Authorization": "s3cret\n"})
        self.enterContext(mock.patch.object(token, "request", return_value=bad_header))
        self.enterContext(mock.patch.object(bug, "request", side_effect=KeyError("s3cret")))
        for client, reason in (
            (Play(self).client, "HTTP 503: no more"),
            (Stub(f"ws://127.0.0.1:{free_port()}/"), r"\[Errno \d+\] .+"),
            (token, r"\w+"),
            (bug, "KeyError"),
        ):
            with self.subTest(reason=reason), self.assertLogs(level="INFO") as logs:
                self.follow(client)
                await until(lambda: len(logs.output) > 4)
                await self.end()
            for line in logs.output:
                if "tornado.access" not in line:
                    expected = rf"^WARNING:client:cannot connect: {reason}; next try in \d\.\d s$"
                    self.assertRegex(line, expected)
                    self.assertNotIn("s3cret", line)

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
        delays: dict[Any, type[Exception]] = dict.fromkeys((0, -1, math.nan), ValueError)
        for delay, error in (delays | dict.fromkeys(("3", None), TypeError)).items():
            with self.subTest(delay=delay), self.assertRaises(error):
                WebSocketClient("wss://localhost/", delay)


class EndTests(ClientCase):
    def setUp(self) -> None:
        super().setUp()
        # Tornado leaves the socket of a broken handshake to the garbage collector.
        self.enterContext(warnings.catch_warnings(action="ignore", category=ResourceWarning))

    @gen_test
    async def test_cancelling_leaves_no_connection(self) -> None:
        """A handshake is not waited for, but closed once it is through; a silent server is left."""
        handshake, silence = Play(self, [message(0, [1])]), Play(self, [])
        handshake.may_connect.clear()
        self.follow(handshake.client)
        await handshake.requested(1)
        await self.end()
        handshake.may_connect.set()
        with self.assertLogs("client", "INFO") as logs:
            self.follow(silence.client)
            await until(lambda: logs.output)
        await self.end()
        for play in handshake, silence:
            await play.ended()
            self.assertEqual((play.closed, play.client.calls), ([1000], 0))

    @gen_test
    async def test_stop_in_on_message(self) -> None:
        """No call follows, though a gap and a new run have been read; start is refused there."""
        gaps = [message(5, [2]), message(0, [3], "b"), message(9, [4], "b")]
        for rest in ([message(1, [2])], gaps):
            for begin in (self.follow, self.begin):
                play = Play(self, [message(0, [1]), *rest])

                def react(samples: list[Any], client: Stub = play.client) -> None:
                    client.stop()
                    if threading.current_thread() is not threading.main_thread():
                        with self.assertRaisesRegex(RuntimeError, "own thread"):
                            client.start()

                play.client.react = react
                begin(play.client)
                await play.ended()
                await asyncio.to_thread(play.client.stop)
                self.assertEqual((play.closed, play.client.calls), ([1000], 1))
                self.assertEqual(play.client.position, len(play.client.samples))

    @gen_test
    async def test_slow_on_message(self) -> None:
        """All that came meanwhile is one call; stop, from another thread, lets no further one."""
        play = Play(self, [message(0, [0])])
        inside, go_on = threading.Event(), threading.Semaphore(0)

        def react(samples: list[Any]) -> None:
            inside.set()
            go_on.acquire()

        def follow() -> None:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(play.client.run())

        play.client.react = react
        self.addCleanup(play.client.stop)
        self.addCleanup(go_on.release, 9)
        following = asyncio.ensure_future(asyncio.to_thread(follow))
        await until(inside.is_set)
        inside.clear()
        play.say(*(message(number, [number]) for number in range(1, 100)))
        go_on.release()
        await until(inside.is_set)
        play.say(*(message(10 * number, [number]) for number in range(10, 100)))
        play.client.stop()
        go_on.release()
        await following
        self.assertEqual(play.client.places, [("a", 0, [0]), ("a", 1, [*range(1, 100)])])
        await play.ended()
        self.assertEqual(play.closed, [1000])

    @gen_test
    async def test_flood_of_messages(self) -> None:
        """What a busy client cannot take, 12 MB, waits at the server, and comes in larger lists."""
        busy, control, free = Stub(self.url), Stub(self.url), threading.Event()
        busy.react = lambda samples: free.wait()
        samples = [f"{number:030000}" for number in range(400)]
        self.server.message_size = 1  # or it would be one message, and too large
        self.follow(control)
        self.begin(busy)
        self.addCleanup(free.set)
        await until(lambda: len(self.server.clients) == 2)
        for sample in samples:  # more than the kernel's buffers can hold
            self.server.send_message([sample])
        await until(lambda: control.position == 400)
        self.assertEqual(sum(one.position < 400 for one in self.server.clients), 1)
        free.set()
        await until(lambda: busy.position == 400)
        await asyncio.to_thread(busy.stop)
        self.assertEqual([busy.samples, control.samples], [samples, samples])
        self.assertLess(busy.calls, 400)  # which is the number of messages

    @gen_test
    async def test_start_and_stop_may_be_called_again(self) -> None:
        """Twice they change nothing more; a later start resumes, in one thread at a time."""

        def threads() -> set[threading.Thread]:  # but for those that look up a host's name
            daemons = {thread for thread in threading.enumerate() if thread.daemon}
            return {thread for thread in daemons if "asyncio" not in thread.name}

        before, client = threads(), Stub(self.url)
        client.stop()
        for _ in range(10):  # not at the end: Tornado keeps the last socket until its next loop
            self.begin(client)
            await asyncio.to_thread(client.stop)  # whatever it is doing
        for count in range(1, 4):
            client.start()
            self.server.send_message([count])
            await client.reach(self.server.epoch, count, 0)
            running = threads()
            client.start()
            self.assertEqual(threads(), running)
            await asyncio.to_thread(client.stop)
            client.stop()
            self.assertEqual(threads(), before)
        client.react = lambda samples: client.stop()  # whose thread may not have ended at the next
        for count in range(4, 24):
            await asyncio.to_thread(client.start)
            self.assertEqual(len(threads() - before), 1)
            self.server.send_message([count])
            await client.reach(self.server.epoch, count, 0)
        await asyncio.to_thread(client.stop)
        self.assertEqual((client.samples, threads()), ([*range(1, 24)], before))

    def test_start_leaves_the_callers_event_loop_alone(self) -> None:
        """Before and after stop, which ends any wait, the calling thread has its own event loop."""
        client, loop = Stub("ws://no-such-host.invalid/"), asyncio.get_event_loop()
        with mock.patch("random.uniform", return_value=1e9), self.assertLogs("client") as logs:
            self.begin(client)
            self.assertIs(asyncio.get_event_loop(), loop)
            self.io_loop.run_sync(lambda: until(lambda: logs.output))
            client.stop()
        self.assertIs(asyncio.get_event_loop(), loop)
        self.assertEqual(len(logs.output), 1)

    @unittest.skipUnless(FDS.exists(), "needs /proc")
    def test_stop_in_the_handshake_leaves_no_descriptor(self) -> None:
        """Five starts and stops in mid-handshake leave at most one descriptor more."""
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = Stub(f"ws://127.0.0.1:{server.getsockname()[1]}/")
            gc.collect()
            before = len(os.listdir(FDS))
            for _ in range(5):
                client.start()
                connection, _ = server.accept()
                with connection:
                    connection.recv(1)
                    client.stop()
            self.assertLessEqual(len(os.listdir(FDS)), before + 1)

    def test_watch_leaves_the_process_as_it_was(self) -> None:
        """Signals, standard output and Tornado's log are the same afterwards, the last line out."""

        def state() -> list[Any]:
            tornado = logging.getLogger("tornado.application")
            signals = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            return [*signals, sys.stdout, tornado.getEffectiveLevel()]

        class Interrupted(Stub):
            shown = 0

            def __str__(self) -> str:
                self.shown += 1
                if self.shown == 2:
                    raise KeyboardInterrupt
                return f"line {self.shown}"

        before = state()
        with contextlib.redirect_stdout(io.StringIO()) as output:
            watch(Interrupted(self.url))
        self.assertEqual(output.getvalue(), "line 1\nline 3\n")
        self.assertEqual(state(), before)

    def test_watch_shows_a_line_a_second(self) -> None:
        """It ends when the thread of the client has ended, though nobody has called stop."""
        client, waits = Stub(self.url), list[float]()

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                assert client._task and client._thread
                client._task.get_loop().call_soon_threadsafe(client._task.cancel)
                client._thread.join()
            self.assertLess(len(waits), 3)

        with mock.patch("time.sleep", wait), contextlib.redirect_stdout(io.StringIO()) as output:
            watch(client)
        self.assertEqual((waits, output.getvalue().count("\n")), ([1, 1], 3))
