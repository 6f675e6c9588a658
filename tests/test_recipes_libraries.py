"""The recipes that need other people's libraries or programs: each test says what it skips without.

The notebook runs in a real kernel, and the servers of the broker recipe beside a real nats-server.
"""

import contextlib
import importlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import tempfile
import unittest
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient
from tornado.ioloop import PeriodicCallback

from client import BetaBinomial
from tests.recipes.changing_coin import ChangeClient, log
from tests.support import ROOT, TIMEOUT, PairCase, until
from tests.test_recipes import RECIPES, URL, Program, RecipeCase, test

NATS_SERVER = shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
LIBRARIES = "websockets", "websocket-client"


def needs(*modules: str, program: object = True) -> Any:
    """Skip a test where one of these modules or the program is missing."""
    there = program and all(map(find_spec, modules))
    return unittest.skipUnless(there, f"needs {modules}: see tests/requirements.txt")


def tosses(seed: int, p: float, number: int) -> list[int]:
    """Toss a coin that falls in the same way every time."""
    coin = random.Random(seed)
    return [int(coin.random() < p) for _ in range(number)]


@needs("river")
class ChangeClientTests(RecipeCase):
    def take(self, client: ChangeClient, samples: list[int], size: int) -> list[int]:
        """Hand the samples over, so many at a time, and return where changes were noticed."""
        with mock.patch.object(log, "warning") as warning:
            for begin in range(0, len(samples), size):
                client.on_message(samples[begin : begin + size])
                client.position += len(samples[begin : begin + size])
        return [call.args[1] for call in warning.call_args_list]

    def test_change_is_noticed(self) -> None:
        """A step from 0.3 to 0.7 is noticed within 200 samples, however many come at a time."""
        for seed, size in itertools.product(range(20), (1, 7, 1500)):
            samples = tosses(seed, 0.3, 1000) + tosses(100 + seed, 0.7, 500)
            client = ChangeClient(URL)
            [noticed] = self.take(client, samples, size)
            self.assertIn(noticed, range(1000, 1200))
            self.assertEqual(client.posterior, BetaBinomial().update(samples[noticed + 1 :]))

    def test_no_false_alarm(self) -> None:
        """Nothing is noticed in 20,000 samples of a coin that does not change."""
        client, samples = ChangeClient(URL), tosses(0, 0.3, 20_000)
        self.assertEqual(self.take(client, samples, 1000), [])
        self.assertEqual(client.posterior, BetaBinomial().update(samples))

    def test_all_or_nothing(self) -> None:
        """Samples that are refused, or fail on the way, change nothing and can come again."""
        samples = tosses(0, 0.3, 1000) + tosses(1, 0.7, 500)
        expected, client = ChangeClient(URL), ChangeClient(URL)
        noticed = self.take(expected, samples, 1500)
        self.take(client, samples[:900], 900)
        before = client.posterior, client.detector.width
        self.assertRaises(ValueError, client.on_message, [2, *samples[900:]])
        with mock.patch.object(log, "warning", side_effect=OSError), self.assertRaises(OSError):
            client.on_message(samples[900:])
        self.assertEqual((client.posterior, client.detector.width), before)
        self.assertEqual(self.take(client, samples[900:], 600), noticed)
        self.assertEqual(client.posterior, expected.posterior)

    @test
    async def test_new_run(self) -> None:
        """Posterior and detector begin anew at a new run of the server, but not at a reconnect."""
        client = ChangeClient(self.url, retry_delay=0.01)
        self.server.send_message([1] * 20)
        with self.assertLogs("client"):
            self.follow(client)
            await until(lambda: client.position == 20)
            await self.close()
            self.listen(self.port)  # the same run
            self.server.send_message([1] * 4)
            await until(lambda: client.position == 24)
            self.assertEqual(client.posterior, BetaBinomial(25, 1))
            await self.restart()
            self.server.send_message([0] * 5)
            await until(lambda: client.epoch == self.server.epoch and client.position == 5)
        self.assertEqual((client.posterior, client.detector.width), (BetaBinomial(1, 6), 5))

    @test
    async def test_program(self) -> None:
        """The program says where it noticed a change, and ends quietly at Ctrl-C."""
        self.server.send_message(tosses(0, 0.3, 1000) + tosses(1, 0.7, 500))
        program = self.start("changing_coin", "client", "--url", self.url)
        await until(lambda: "noticed a change at sample 1" in program.err())
        await self.interrupt(program)


class ImportingTests(RecipeCase):
    @test
    async def test_ctrl_c_while_river_is_imported(self) -> None:
        """The import takes a second or more, and Ctrl-C in it is quiet."""
        package = self.folder / "river"
        package.mkdir()
        (package / "__init__.py").write_text(
            "import threading; print('imports', flush=True); threading.Event().wait()"
        )
        self.enterContext(mock.patch.dict(os.environ, {"PYTHONPATH": str(self.folder)}))
        program = self.start("changing_coin", "client")
        self.assertEqual(await program.line(), "imports")
        await self.interrupt(program)


@needs("ipykernel", "jupyter_client", "matplotlib")
class NotebookTests(PairCase):
    @contextlib.asynccontextmanager
    async def kernel(self) -> AsyncIterator[None]:
        """Start a kernel, and kill it at the end."""
        kernelspec: Any = importlib.import_module("jupyter_client.kernelspec")
        folder = self.enterContext(tempfile.TemporaryDirectory())
        manager = importlib.import_module("jupyter_client.manager").AsyncKernelManager(
            kernel_spec_manager=kernelspec.KernelSpecManager(kernel_dirs=[]),  # this Python's own
            connection_file=str(Path(folder, "connection.json")),
            transport="ipc",
        )
        await manager.start_kernel(cwd=str(ROOT), env={**os.environ, "IPYTHONDIR": folder})
        self.client = manager.client()
        self.client.start_channels()
        await self.client.wait_for_ready(timeout=TIMEOUT)
        try:
            yield
        finally:
            self.client.stop_channels()
            await manager.shutdown_kernel(now=True)

    async def run_cell(self, cell: str) -> list[dict[str, Any]]:
        """Run a cell, which must succeed, and return all that was published up to its end."""
        request, published, state = self.client.execute(cell), [], ("", "")
        while state != (request, "idle"):
            message = await self.client.get_iopub_msg(timeout=TIMEOUT)
            published.append(content := message["content"])
            self.assertNotEqual(message["msg_type"], "error", content)
            state = message["parent_header"].get("msg_id"), content.get("execution_state")
        return published

    async def pictures(self, cell: str) -> list[tuple[str, str]]:
        """Run a cell, and return the pictures that came, each with the place where it is shown."""
        contents = [content for content in await self.run_cell(cell) if "transient" in content]
        return [(c["data"]["image/png"], c["transient"]["display_id"]) for c in contents]

    @test
    async def test_notebook(self) -> None:
        """The picture moves while another cell runs, stops by itself, and can begin anew."""
        text = (RECIPES / "notebook.py").read_text(encoding="utf-8")
        text = text.replace("ws://localhost:8765/websocket", self.url)
        head, first, look, last = re.split("^(?=# %%)", text, flags=re.MULTILINE)
        wait = "drawn = client.drawn\nwhile client.drawn == drawn: time.sleep(0.01)\n"
        toss = PeriodicCallback(lambda: self.server.send_message([0, 1]), 10)
        clients = self.server.clients
        async with self.kernel():
            await self.run_cell(head)
            first = first.replace("ENOUGH = 0.02", "ENOUGH = 0")
            shown = await self.pictures(first)
            toss.start()
            moved = await self.pictures(wait + wait)
            toss.stop()
            self.assertGreater(len({*shown, *moved}), 2)
            self.assertEqual(len({place for _, place in shown + moved}), 1)
            self.assertIn("mean 0.5000", str(await self.run_cell(look)))
            half = self.server.end // 2
            enough = BetaBinomial(half + 3, half + 3).sd  # after two more of each
            self.server.send_message([0, 1])
            await self.run_cell(f"while client.position <= {2 * half}: time.sleep(0.01)")
            await self.run_cell(f"ENOUGH = {enough}")
            self.server.send_message([0])
            await self.run_cell(f"while client.position <= {2 * half + 2}: time.sleep(0.01)")
            self.assertEqual(len(clients), 1)
            self.server.send_message([1])
            await until(lambda: not clients)
            final, again = await self.pictures(last)
            self.assertEqual(final, again)  # its own last picture has all samples
            await self.run_cell(first)
            await until(lambda: clients)
            old = set(clients)
            await self.run_cell(first)
            await until(lambda: len(clients) == 1 and not clients & old)
            await self.run_cell(last)
            await until(lambda: not clients)


@needs("nats", program=NATS_SERVER)
class BrokerTests(RecipeCase):
    async def start_broker(self) -> None:
        """Start a broker on a free port with a store of its own."""
        options = "-js", "-a", "127.0.0.1", "-p", -1, "-sd", "store", "--ports_file_dir", "."
        self.program(NATS_SERVER, *options, cwd=self.folder)
        await until(lambda: [path for path in self.folder.glob("*.ports") if path.stat().st_size])
        (path,) = self.folder.glob("*.ports")
        self.broker = json.loads(path.read_text())["nats"][0]
        connect: Any = importlib.import_module("nats").connect
        self.connection = await connect(self.broker)
        self.jetstream = self.connection.jetstream()

    async def serve_stream(self) -> tuple[Program, str]:
        """Start a server; return it and its URL."""
        server = self.copy("broker", "--broker", self.broker, "serve", "--port", 0)
        return server, await server.line()

    async def stored(self) -> list[Any]:
        """Return every sample that the broker holds, from the broker itself."""
        state = (await self.jetstream.stream_info("samples")).state
        numbers = range(state.first_seq, state.last_seq + 1)
        messages = [await self.jetstream.get_msg("samples", number) for number in numbers]
        return [json.loads(message.data) for message in messages]

    @test
    async def test_another_server_goes_on_where_a_killed_one_was(self) -> None:
        """A client moves from a killed server to another: nothing is lost, nothing is doubled."""
        await self.start_broker()
        producer = self.start("broker", "--broker", self.broker, "produce")
        (first, url), (second, other) = await self.serve_stream(), await self.serve_stream()
        client = self.recorder(url)
        await until(lambda: client.position >= 10)
        epoch, client.url = client.epoch, other  # as a proxy would send it there
        first.kill()  # SIGKILL
        first.wait()
        reached = client.position
        await until(lambda: client.position >= reached + 10)
        self.assertEqual((client.epoch, client.missed), (epoch, 0))
        received = list(client.samples)  # first, since more come while the broker is asked
        stored = await self.stored()
        self.assertEqual(received, stored[: len(received)])
        third, late = await self.serve_stream()  # which has to catch up first
        joiner = self.recorder(late)
        await until(lambda: joiner.position >= len(stored))
        self.assertEqual(joiner.samples[: len(stored)], stored)
        self.assertEqual((joiner.epoch, joiner.position), (epoch, len(joiner.samples)))
        await self.interrupt(producer, second, third)
        self.assertEqual(producer.err(), "")
        await self.connection.close()

    @test
    async def test_lost_consumer_and_purged_stream(self) -> None:
        """A server whose consumer the broker lost goes on; what was purged meanwhile is missed."""
        await self.start_broker()
        taken = self.start("broker", "--broker", self.broker, "serve", "--port", self.port)
        self.assertRegex((await taken.ended())[1], r"\Acannot listen on .*\n\Z")
        _, url = await self.serve_stream()
        client = self.recorder(url)
        for numbers in range(5), range(5, 20):
            for number in numbers:
                await self.jetstream.publish("samples", b"%d" % number)
            if 0 in numbers:
                await until(lambda: client.position == 5)
                for consumer in await self.jetstream.consumers_info("samples"):
                    await self.jetstream.delete_consumer("samples", consumer.name)
        await self.jetstream.purge_stream("samples", keep=5)
        with self.assertLogs("client", "WARNING"):
            with contextlib.suppress(AssertionError):  # it notices after some 20 s
                await until(lambda: client.position == 20)
            await until(lambda: client.position == 20)
        self.assertEqual((client.samples, client.missed), ([*range(5), *range(15, 20)], 10))
        await self.connection.close()

    @test
    async def test_stream_made_anew(self) -> None:
        """A server whose stream was replaced by another of the same name ends with one line."""
        await self.start_broker()
        server, url = await self.serve_stream()
        client = self.recorder(url)
        await self.jetstream.publish("samples", b"1")
        await until(lambda: client.samples)
        await self.jetstream.delete_stream("samples")
        await self.jetstream.add_stream(name="samples")
        with self.assertLogs("client", "WARNING"):
            status, log = await server.ended()
        self.assertRegex(log, r"error: the stream was made anew: start this server again\n\Z")
        self.assertEqual(status, 1)
        await self.connection.close()

    @test
    async def test_health_checks(self) -> None:
        """What a proxy may ask leaves no traceback, and a client of the same server goes on."""
        await self.start_broker()
        server, url = await self.serve_stream()
        client = self.recorder(url)
        await until(lambda: client.epoch)
        address = urlsplit(url)
        socket.create_connection((address.hostname or "", address.port or 0)).close()
        for path, status in ("", 404), ("websocket", 400):
            page = f"http://{address.netloc}/{path}"
            answer = await AsyncHTTPClient().fetch(page, raise_error=False)
            self.assertEqual(answer.code, status)
        await self.jetstream.publish("samples", b"1")
        await until(lambda: client.samples)
        await self.goodbye(server, client)
        self.assertRegex(
            server.err(), r"\A.* 1 in all\n.* 404 GET / .*\n.* 400 GET .*\n.* 0 left\n\Z"
        )
        await self.connection.close()


@needs("websockets", "websocket")
class OtherLibrariesTests(RecipeCase):
    async def begin(self) -> list[Program]:
        """Start both clients, and wait until they are there."""
        clients = [self.start("other_libraries", name, "--url", self.url) for name in LIBRARIES]
        await until(lambda: len(self.server.clients) == len(clients))
        return clients

    async def assert_counted(self, clients: list[Program], *counts: int) -> None:
        """Wait until all clients have counted so much."""
        line = "ones {}  trials {}  missed {}\n".format(*counts)
        await until(lambda: all(client.out().endswith(line) for client in clients))

    @test
    async def test_count_each_sample_once_through_a_drop(self) -> None:
        """What comes before, during and after a drop is counted once, and Ctrl-C is quiet."""
        clients, samples = await self.begin(), tosses(1, 0.72, 120)
        for end in 40, 80, 120:
            self.server.send_message(samples[end - 40 : end])
            await self.assert_counted(clients, sum(samples[:end]), end, 0)
            dropped: Any = set(self.server.clients)
            for handler in dropped:
                handler.ws_connection.stream.close()  # as a network breaks
            await until(lambda: not dropped & self.server.clients)  # noqa: B023
        self.server.history_size = 10
        self.server.send_message([1] * 25)
        await self.assert_counted(clients, sum(samples) + 10, 130, 15)
        queries = [handler.request.query for handler in self.server.clients]
        self.assertEqual(queries, [f"epoch={self.server.epoch}&offset=120"] * 2)
        await self.interrupt(*clients)
        for client in clients:
            self.assertRegex(client.err(), r"\A(.*; next try in .* s\n){3}.* missed 15 .*\n\Z")

    @test
    async def test_take_a_full_message_of_large_samples(self) -> None:
        """A message of 2 MB, samples that are not 0 or 1, costs just those samples."""
        clients = await self.begin()
        self.server.send_message(["x" * 2_000] * (self.server.message_size - 1) + [1])
        await self.assert_counted(clients, 1, 1, 0)
        for client in clients:
            self.assertRegex(client.err(), r"\A(.* not 0 or 1: 'x{79}\n){999}\Z")
