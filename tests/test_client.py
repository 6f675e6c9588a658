"""The client counts every sample once, and comes back from whatever happens to its connection."""

import asyncio
import dataclasses
import gc
import json
import logging
import math
import re
import threading
import unittest
import warnings
from typing import Any, ClassVar
from unittest import mock

from tornado.testing import gen_test
from tornado.web import Application, HTTPError
from tornado.websocket import WebSocketHandler

from client import BetaBinomial, WebSocketClient
from tests.support import PairCase, until, wait_until


class BetaBinomialTests(unittest.TestCase):
    def test_known_answer(self) -> None:
        """A flat prior and 1, 1, 0, 1 give Beta(4, 2): mean 4/6, variance 4*2 / (6*6*7) = 2/63."""
        posterior = BetaBinomial().update([1, 1, 0, 1])
        self.assertEqual((posterior.successes, posterior.trials), (3, 4))
        self.assertEqual((posterior.alpha, posterior.beta), (4, 2))
        self.assertAlmostEqual(posterior.mean, 4 / 6, places=15)
        self.assertAlmostEqual(posterior.sd, math.sqrt(2 / 63), places=15)
        self.assertEqual(str(posterior), "Beta(4, 2)  mean 0.6667  sd 0.1782")

    def test_flat_prior(self) -> None:
        """Before any sample it is Beta(1, 1): mean 1/2, sd sqrt(1/12)."""
        prior = BetaBinomial()
        self.assertEqual((prior.alpha, prior.beta, prior.mean), (1, 1, 0.5))
        self.assertAlmostEqual(prior.sd, math.sqrt(1 / 12), places=15)

    def test_order_and_batches_do_not_matter(self) -> None:
        """The same samples give the same posterior, one by one or all at once."""
        one_by_one = BetaBinomial()
        for sample in (0, 1, 1, 0, 1):
            one_by_one = one_by_one.update([sample])
        self.assertEqual(one_by_one, BetaBinomial().update([1, 1, 1, 0, 0]))

    def test_is_immutable(self) -> None:
        """An update returns a new posterior, and leaves the old one as it was."""
        posterior = BetaBinomial(3, 4)
        self.assertEqual(posterior.update([1]), BetaBinomial(4, 5))
        self.assertEqual(posterior, BetaBinomial(3, 4))
        with self.assertRaises(dataclasses.FrozenInstanceError):
            posterior.trials = 5  # type: ignore[misc]

    def test_refuses_anything_but_0_and_1(self) -> None:
        """2, -1, halves, text, null and nested lists are a ValueError."""
        bad: list[Any] = [2, -1, 0.5, "1", None, [1], {}, math.nan]
        for sample in bad:
            with self.subTest(sample=sample), self.assertRaises(ValueError):
                BetaBinomial().update([1, sample, 0])

    def test_density_is_highest_at_the_mode(self) -> None:
        """The picture is flat for the prior, and peaks in the column that holds the mode."""
        self.assertEqual(BetaBinomial().density(12), "█" * 12)
        for successes, trials in ((0, 9), (9, 9), (3, 4), (720_000, 1_000_000)):
            picture = BetaBinomial(successes, trials).density(40)
            self.assertEqual(len(picture), 40)
            self.assertEqual(picture[min(int(40 * successes / trials), 39)], "█")


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


class ClientCase(PairCase):
    """A scripted server, and a client that follows it."""

    def play(self, *script: list[str | bytes | int]) -> type[ScriptedServer]:
        """Serve these connections one after the other; more of them get 503."""
        scripted = type(
            "Played", (ScriptedServer,), {"script": list(script), "requests": [], "closed": []}
        )
        address = self.serve(Application([("/", scripted)]))
        self.client = WebSocketClient(f"ws://{address}/", retry_delay=0.01)
        self.follow(self.client)
        return scripted

    def counts(self) -> tuple[int, int, int]:
        """Return trials, position and missed."""
        return self.client.posterior.trials, self.client.position, self.client.missed


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
    async def test_first_message_ever_sets_the_position(self) -> None:
        """Samples before the first message were never promised, so they are not missed."""
        self.play([message(1_000, [1])])
        await until(lambda: self.client.posterior.trials)
        self.assertEqual(self.counts(), (1, 1_001, 0))

    @gen_test
    async def test_new_epoch_starts_at_zero_and_keeps_the_counts(self) -> None:
        """After a restart the client counts the new run from its start, and keeps its counts."""
        self.play([message(7, [1, 0]), message(0, [1, 1, 1], "bbbbbbbb")])
        await until(lambda: self.client.epoch == "bbbbbbbb")
        self.assertEqual(self.counts(), (5, 3, 0))

    @gen_test
    async def test_new_epoch_that_has_rolled_over_counts_what_is_missed(self) -> None:
        """What has left the new run's history before the client came is missed."""
        self.play([message(7, [1, 0]), message(40, [1], "bbbbbbbb")])
        await until(lambda: self.client.epoch == "bbbbbbbb")
        self.assertEqual(self.counts(), (3, 41, 40))

    @gen_test
    async def test_jump_is_missed_and_said_once(self) -> None:
        """An offset beyond the position: the difference is missed, and one line says so."""
        with self.assertLogs("client", "WARNING") as logs:
            self.play([message(0, [1]), message(11, [1]), message(12, [1])])
            await until(lambda: self.client.posterior.trials == 3)
        self.assertEqual(self.counts(), (3, 13, 10))
        said = "WARNING:client:missed 10 samples, which had left the server's history"
        self.assertEqual(logs.output, [said])

    @gen_test
    async def test_overlap_is_skipped(self) -> None:
        """Samples before the position have been counted already."""
        self.play([message(0, [1, 1]), message(0, [1, 1, 0]), message(1, [1]), message(3, [0])])
        await until(lambda: self.client.position == 4)
        self.assertEqual(self.client.posterior, BetaBinomial(2, 4))
        self.assertEqual(self.client.missed, 0)

    @gen_test
    async def test_on_message_sees_only_samples(self) -> None:
        """on_message gets each sample once, in lists that are never empty, and never None."""
        seen: list[list[Any]] = []
        played = self.play(
            [message(0, []), message(0, ["a", None]), message(1, [None, {}]), 1000],
            [message(3, [])],
        )
        with mock.patch.object(self.client, "on_message", seen.append):
            await until(lambda: len(played.requests) > 1)
        self.assertEqual(seen, [["a", None], [{}]])

    @gen_test
    async def test_position_moves_only_when_on_message_has_returned(self) -> None:
        """Samples that on_message refuses, for whatever reason, are asked for again."""
        for error, level in ((ValueError("no"), "WARNING"), (TypeError("bug"), "ERROR")):
            with self.subTest(error=error):
                played = self.play([message(0, [1]), message(1, [0, 0])], [message(1, [0, 0])])
                update = self.client.on_message
                with (
                    self.assertLogs("client", "WARNING") as logs,
                    mock.patch.object(
                        self.client, "on_message", side_effect=[None, error, None], wraps=update
                    ),
                ):
                    await until(lambda: self.client.position == 3)
                self.assertEqual(played.requests[1], "/?epoch=aaaaaaaa&offset=1")
                self.assertEqual(logs.records[0].levelname, level)
                self.assertEqual(logs.records[0].exc_info is not None, level == "ERROR")
                self.following.pop().cancel()

    @gen_test
    async def test_message_that_cannot_be_understood_changes_nothing(self) -> None:
        """One line with the message, nothing counted, the connection closed and tried again."""
        good = message(0, [1, 0])
        for bad in (
            "x",
            "",
            "[]",
            "{}",
            "null",
            "NaN",
            "[" * 100_000,
            b"\x00\xff",
            good.encode(),
            '{"epoch": "aaaaaaaa", "offset": NaN, "samples": []}',
            '{"epoch": "aaaaaaaa", "offset": 1' + "0" * 5_000 + ', "samples": []}',
            message(1, [1], 1),
            message("2", [1]),
            message(None, [1]),
            message(True, [1]),
            message(1.5, [1]),
            message(-1, [1]),
            message(10**15 - 1, [1]),
            message(2, [1], "\ud800"),
            message(2, [1], "a" * 65),
            message(2, "1"),
            message(2, {"0": 1}),
            message(2, [2]),
            message(9, [1, "1"]),
            message(0, [2], "bbbbbbbb"),
        ):
            with self.subTest(bad=bad[:60]), self.assertLogs("client", "WARNING") as logs:
                played = self.play([good, bad, message(2, [1] * 100)], [message(2, [])])
                await until(lambda played=played: len(played.requests) > 1)  # type: ignore[misc]
                self.assertEqual(self.counts(), (2, 2, 0))
                self.assertEqual(self.client.epoch, "aaaaaaaa")
                self.assertEqual(played.closed, [1000])
                line = logs.records[0].getMessage()
                self.assertIn(f"cannot understand {bad[:80]!r}: ", line)
                self.assertRegex(line, r"; next try in \d+\.\d s$")
                self.assertNotIn("\n", line)
                self.assertLess(len(line), 300)
                self.following.pop().cancel()


class RetryTests(ClientCase):
    @gen_test
    async def test_wait_grows_until_a_message_arrives(self) -> None:
        """The nth wait is below retry_delay * 2**n; a message, not a handshake, starts again."""
        bounds: list[float] = []

        def uniform(low: float, high: float) -> float:
            self.assertEqual(low, 0)
            bounds.append(high)
            return 0.0

        with mock.patch("random.uniform", uniform):
            self.play([1001], [1001], [message(0, [1]), 1001], [1001], [message(1, [2])], [1001])
            self.client.retry_delay = 3.0
            await until(lambda: len(bounds) > 10)
            self.client._attempt = 5_000  # a month without a server
            count = len(bounds)
            await until(lambda: len(bounds) > count + 2)
        self.assertEqual(bounds[:10], [3, 6, 3, 6, 12, 24, 30, 30, 30, 30])
        self.assertEqual(bounds[-1], 30)

    @gen_test
    async def test_every_failure_is_one_try_and_one_line(self) -> None:
        """Garbage, refusals, bad handshakes and closed connections: one try, one line, a wait."""
        ok = b"HTTP/1.1 101 S\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        for reply, reason in (
            (b"", "Stream closed"),
            (b"\0\xff garbage\r\n\r\n", "Stream is closed"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "Non-websocket response"),
            (b"HTTP/1.1 301 Moved\r\nLocation: ws://localhost/\r\n\r\n", "HTTP 301: Moved"),
            (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "HTTP 403: Forbidden"),
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
            client = WebSocketClient(f"ws://127.0.0.1:{port}/", retry_delay=0.01)
            with (
                self.subTest(reply=reply[:30]),
                self.assertLogs("client", "WARNING") as logs,
                mock.patch.object(logging.getLogger("tornado.application"), "disabled", True),
                # Tornado forgets to close the connection of a 101 that it does not accept.
                warnings.catch_warnings(action="ignore", category=ResourceWarning),
            ):
                task = self.follow(client)
                await until(lambda logs=logs: len(logs.output) >= 5)  # type: ignore[misc]
                task.cancel()
                await asyncio.wait([task])
                self.assertIn(len(logs.output), (connections, connections - 1))
                for line in logs.output:
                    pattern = rf"cannot connect: {re.escape(reason)}; next try in \d+\.\d s$"
                    self.assertRegex(line, pattern)
                gc.collect()
            server.close()

    @gen_test
    async def test_pings_and_the_bound_of_the_handshake(self) -> None:
        """The handshake is bounded at 10 s, and pings go out every 10 s with a timeout of 10 s."""
        failed = mock.AsyncMock(side_effect=OSError("not now"))
        with (
            mock.patch("client.websocket_connect", failed) as connect,
            self.assertLogs("client", "WARNING"),
        ):
            self.follow(WebSocketClient(self.url, retry_delay=0.01))
            await until(lambda: connect.call_count > 1)
        (request, *_), options = connect.call_args
        self.assertEqual((request.connect_timeout, request.request_timeout), (10, 10))
        self.assertEqual((options["ping_interval"], options["ping_timeout"]), (10, 10))

    @gen_test
    async def test_a_closed_connection_is_said_with_its_code(self) -> None:
        """The line for a closed connection has the code and the reason that the server gave."""
        client = WebSocketClient(self.url, retry_delay=0.01)
        with self.assertLogs("client") as logs:
            self.follow(client)
            await until(lambda: client.epoch)
            await self.restart()
            await until(lambda: client.epoch == self.server.epoch)
        self.assertIn("connected to ws://", logs.output[0])
        self.assertIn("closed by the server: 1001 'going away'; next try in ", logs.output[1])

    def test_a_url_that_can_never_work_is_refused_at_once(self) -> None:
        """Another scheme, none, no host, a port out of range, no text: ValueError."""
        for url in (
            "http://localhost/",
            "localhost:8765",
            "",
            "ws://",
            "ws://:80/",
            "ws:///websocket",
            "ws://localhost:99999/",
            "ws://localhost:0/",
            "ws://localhost:abc/",
            "ws://[::1/",
            "ws://localhost/?x=\udcff",  # a byte of the command line that is not UTF-8
            "ws://local\nhost/",
        ):
            with self.subTest(url=url), self.assertRaises(ValueError):
                WebSocketClient(url)

    @gen_test
    async def test_a_query_in_the_url_is_kept(self) -> None:
        """epoch and offset join what the URL's query says already."""
        played = self.play([message(0, [1]), 1001], [message(1, [])])
        self.client.url += "?token=x"
        await until(lambda: len(played.requests) > 1)
        self.assertEqual(played.requests[:2], ["/?token=x", "/?token=x&epoch=aaaaaaaa&offset=1"])


class RunTests(ClientCase):
    @gen_test
    async def test_cancelling_closes_the_connection_with_1000(self) -> None:
        """run() that is cancelled says 1000 to the server, and takes nothing more."""
        played = self.play([message(0, [1])])
        await until(lambda: self.client.posterior.trials)
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

        client = WebSocketClient(f"ws://{self.serve(Application([('/', Slow)]))}/")
        task = asyncio.ensure_future(client.run())
        await opened.wait()
        task.cancel()
        await asyncio.wait([task])
        go_on.set()
        await until(lambda: Slow.closed)
        self.assertEqual(Slow.closed, [1000])
        self.assertEqual(client.posterior.trials, 0)


class ThreadTests(PairCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = WebSocketClient(self.url, retry_delay=0.01)
        self.addCleanup(self.client.stop)

    @gen_test
    async def test_start_and_stop_may_be_called_again(self) -> None:
        """start() and stop() twice each change nothing more; a second start resumes."""
        loop = asyncio.get_running_loop()
        for count in (1, 2, 3):
            self.client.start()
            thread = self.client._thread
            self.client.start()
            self.assertIs(self.client._thread, thread)
            assert thread is not None
            self.server.send_message([1])
            await until(lambda count=count: self.client.posterior.trials == count)  # type: ignore[misc]
            self.assertEqual(len(self.server.clients), 1)
            await loop.run_in_executor(None, self.client.stop)
            self.assertFalse(thread.is_alive())
            self.client.stop()
            await until(lambda: not self.server.clients)
        self.assertEqual(self.client.missed, 0)
        self.assertEqual(self.client.position, self.server.end)

    @gen_test
    async def test_start_and_stop_at_once(self) -> None:
        """stop() right after start() ends the thread, whatever it is doing."""
        loop = asyncio.get_running_loop()
        for _ in range(20):
            self.client.start()
            thread = self.client._thread
            await loop.run_in_executor(None, self.client.stop)
            assert thread is not None
            self.assertFalse(thread.is_alive())
        await until(lambda: not self.server.clients)

    @gen_test
    async def test_stop_from_on_message(self) -> None:
        """on_message may call stop(): its samples are counted, the next message's are not."""
        more = threading.Event()

        def on_message(samples: list[int]) -> None:
            more.wait()
            self.client.stop()

        with mock.patch.object(self.client, "on_message", on_message):
            self.client.start()
            thread = self.client._thread
            assert thread is not None
            await until(lambda: self.client.epoch)
            (handler,) = self.server.clients
            for offset in range(100):
                await handler.write_message(message(offset, [1], self.server.epoch))
            more.set()
            await until(lambda: not thread.is_alive())
        self.assertEqual(self.client.position, 1)
        await until(lambda: not self.server.clients)

    def test_stop_ends_a_wait_at_once(self) -> None:
        """stop() ends a client that is waiting to try again, however long the wait."""
        client = WebSocketClient(f"ws://127.0.0.1:{self.port}/nowhere", retry_delay=1e9)
        with mock.patch("random.uniform", return_value=1e9), self.assertLogs("client"):
            client.start()
            self.io_loop.run_sync(lambda: until(lambda: client._attempt))
            client.stop()

    def test_start_leaves_the_callers_event_loop_alone(self) -> None:
        """After start() and stop() the calling thread has the event loop that it had before."""
        before = asyncio.get_event_loop_policy().get_event_loop()
        client = WebSocketClient("ws://no-such-host.invalid/")
        with self.assertLogs("client"):
            client.start()
            self.assertIs(asyncio.get_event_loop_policy().get_event_loop(), before)
            self.io_loop.run_sync(lambda: until(lambda: client._attempt))
            client.stop()
        self.assertIs(asyncio.get_event_loop_policy().get_event_loop(), before)

    def test_stop_without_start(self) -> None:
        """stop() on a client that was never started does nothing."""
        WebSocketClient(self.url).stop()


class PairTests(PairCase):
    attributes: ClassVar[dict[str, Any]] = {"history_size": 100}

    async def up_to_date(self, *clients: WebSocketClient) -> None:
        def condition() -> bool:
            return all(
                (client.epoch, client.position) == (self.server.epoch, self.server.end)
                for client in clients
            )

        await until(condition)

    @gen_test
    async def test_short_disconnect_loses_nothing(self) -> None:
        """A client that is back before its position leaves the history has missed nothing."""
        control = WebSocketClient(self.url, 0.01)
        self.follow(control)
        await self.up_to_date(control)
        (undisturbed,) = self.server.clients
        disturbed = WebSocketClient(self.url, 0.01)
        self.follow(disturbed)
        for _ in range(20):
            await self.up_to_date(disturbed, control)
            self.server.send_message([0, 1, 1])
            for handler in self.server.clients - {undisturbed}:
                handler.close()
            self.server.send_message([1])
        await self.up_to_date(disturbed, control)
        self.assertEqual(disturbed.posterior, BetaBinomial(60, 80))
        self.assertEqual(control.posterior, BetaBinomial(60, 80))
        self.assertEqual((disturbed.missed, control.missed), (0, 0))

    @gen_test
    async def test_long_disconnect_is_counted_as_missed(self) -> None:
        """A client that comes back too late says exactly how many it missed, and goes on."""
        client = WebSocketClient(self.url, 0.01)
        task = self.follow(client)
        self.server.send_message([1] * 10)
        await self.up_to_date(client)
        task.cancel()
        await asyncio.wait([task])
        for _ in range(25):
            self.server.send_message([0] * 10)
        self.follow(client)
        await self.up_to_date(client)
        self.assertEqual(client.missed, 150)
        self.assertEqual(client.posterior, BetaBinomial(10, 110))
        self.assertEqual(client.posterior.trials, client.position - client.missed)

    @gen_test
    async def test_late_joiner_gets_everything(self) -> None:
        """While the history is not full, a late joiner's posterior equals that of the first."""
        first = WebSocketClient(self.url, 0.01)
        self.follow(first)
        for sample in (1, 0, 1, 1) * 20:
            self.server.send_message([sample])
        late = WebSocketClient(self.url, 0.01)
        self.follow(late)
        await self.up_to_date(first, late)
        self.assertEqual(first.posterior, late.posterior)
        self.assertEqual(late.posterior, BetaBinomial(60, 80))

    @gen_test
    async def test_late_joiner_of_a_full_history_has_missed_nothing(self) -> None:
        """What had left the history before a client first came was never promised to it."""
        for _ in range(30):
            self.server.send_message([1] * 10)
        late = WebSocketClient(self.url, 0.01)
        self.follow(late)
        await self.up_to_date(late)
        self.assertEqual((late.posterior.trials, late.missed), (100, 0))

    @gen_test
    async def test_restarted_server_is_followed_from_its_start(self) -> None:
        """After a restart the new run is counted from its beginning, and the counts are kept."""
        client = WebSocketClient(self.url, 0.01)
        self.follow(client)
        self.server.send_message([1] * 50)
        await self.up_to_date(client)
        for run in range(1, 4):
            await self.restart()
            self.server.send_message([0] * 20)
            await self.up_to_date(client)
            self.assertEqual(client.posterior, BetaBinomial(50, 50 + 20 * run))
        self.assertEqual(client.missed, 0)

    @gen_test
    async def test_closed_before_the_first_message(self) -> None:
        """A connection that ends before its first message has counted nothing: joins again."""
        client = WebSocketClient(self.url, 0.01)
        with mock.patch.object(self.server, "catch_up", lambda handler: handler.close()):
            self.follow(client)
            await until(lambda: client._attempt > 2)
        self.assertIsNone(client.epoch)
        self.server.send_message([1])
        await self.up_to_date(client)
        self.assertEqual(client.posterior, BetaBinomial(1, 1))


class NotebookTests(PairCase):
    def test_posterior_moves_while_the_caller_goes_on(self) -> None:
        """After start() the posterior moves in the background, and every look at it is a pair."""
        server_thread = threading.Thread(target=self.io_loop.start)
        client = WebSocketClient(self.url, retry_delay=0.01)
        server_thread.start()
        client.start()
        try:
            wait_until(lambda: client.epoch)
            for trials in range(10, 101, 10):
                self.io_loop.add_callback(self.server.send_message, [1, 0] * 5)
                wait_until(lambda trials=trials: client.posterior.trials == trials)  # type: ignore[misc]
                self.assertEqual(client.posterior.successes * 2, client.posterior.trials)
        finally:
            client.stop()
            self.io_loop.add_callback(self.io_loop.stop)
            server_thread.join()


if __name__ == "__main__":
    unittest.main()
