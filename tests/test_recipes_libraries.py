"""The recipes that need other people's libraries or programs: each test says what it skips without.

The notebook runs in a real kernel, and the servers of the broker recipe beside a real nats-server.
"""

import importlib
import itertools
import json
import os
import random
import re
import sys
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient
from tornado.ioloop import PeriodicCallback

from client import BetaBinomial
from tests.recipes.changing_coin import ChangeClient, log
from tests.support import TIMEOUT, accepts, until
from tests.test_recipes import RECIPES, URL, Program, RecipeCase, needs, which

LIBRARIES = "websockets", "websocket-client"


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
        """A step from 0.3 to 0.7 is noticed within 200 samples, and nothing where there is none."""
        for seed, size in itertools.product(range(20), (1, 7, 1500)):
            samples = tosses(seed, 0.3, 1000) + tosses(100 + seed, 0.7, 500)
            client = ChangeClient(URL)
            [noticed] = self.take(client, samples, size)
            self.assertIn(noticed, range(1000, 1200))
            self.assertEqual(client.posterior, BetaBinomial().update(samples[noticed + 1 :]))
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

    async def test_new_run(self) -> None:
        """Posterior and detector begin anew at a new run of the server, but not at a reconnect."""
        client = ChangeClient(self.url, retry_delay=0.01)
        self.server.send_message([1] * 20)
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

    async def test_program(self) -> None:
        """It says where it noticed a change; Ctrl-C is quiet, also while river is imported."""
        self.server.send_message(tosses(0, 0.3, 1000) + tosses(1, 0.7, 500))
        program = self.start("changing_coin", "client", "--url", self.url)
        await until(lambda: "noticed a change at sample 1" in program.err())
        slow = "import threading; print('imports', flush=True); threading.Event().wait()"
        (self.folder / "river.py").write_text(slow)
        self.enterContext(mock.patch.dict(os.environ, {"PYTHONPATH": str(self.folder)}))
        importing = self.start("changing_coin", "client")
        self.assertEqual(await importing.line(), "imports")
        await self.interrupt(program, importing)


@needs("ipykernel", "jupyter_client", "matplotlib")
class NotebookTests(RecipeCase):
    async def start_kernel(self) -> None:
        """Start a kernel, and a client of it."""
        path = self.folder / "kernel.json"
        options = "-f", path, "--transport=ipc", f"--ipython-dir={self.folder}"
        self.program(sys.executable, "-m", "ipykernel", *options)
        await until(lambda: path.exists() and path.read_text().rstrip().endswith("}"))
        kernel_client = importlib.import_module("jupyter_client.asynchronous").AsyncKernelClient
        self.client: Any = kernel_client(connection_file=str(path))
        self.client.load_connection_file()
        self.client.start_channels()
        self.addCleanup(self.client.stop_channels)
        await self.client.wait_for_ready(timeout=TIMEOUT)

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

    async def test_notebook(self) -> None:
        """The picture moves while another cell runs, stops by itself, and can begin anew."""
        text = (RECIPES / "notebook.py").read_text(encoding="utf-8")
        text = text.replace("ws://localhost:8765/websocket", self.url)
        head, first, look, last = re.split("^(?=# %%)", text, flags=re.MULTILINE)
        wait = "drawn = client.drawn\nwhile client.drawn == drawn: time.sleep(0.01)\n"
        toss = PeriodicCallback(lambda: self.server.send_message([0, 1]), 10)
        clients = self.server.clients
        await self.start_kernel()
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


@needs("nats", program="nats-server")
class BrokerTests(RecipeCase):
    async def start_broker(self) -> None:
        """Start a broker on a free port with a store of its own."""
        options = "-js", "-a", "127.0.0.1", "-p", -1, "-sd", "store"
        broker = self.program(which("nats-server"), *options, cwd=self.folder)
        await until(lambda: "Server is ready" in broker.err())
        (address,) = re.findall(r"Listening for client connections on (\S+)", broker.err())
        self.broker = f"nats://{address}"
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

    async def test_another_server_goes_on_where_a_killed_one_was(self) -> None:
        """Health checks disturb no client, and one that has to move loses and doubles nothing."""
        await self.start_broker()
        producer = self.start("broker", "--broker", self.broker, "produce")
        (first, url), (second, other) = await self.serve_stream(), await self.serve_stream()
        client = self.recorder(url)
        await until(lambda: client.epoch)
        self.assertTrue(accepts(urlsplit(url).port or 0))  # as the health check of a proxy
        for path, status in ("", 404), ("websocket", 400):
            page = f"http://{urlsplit(url).netloc}/{path}"
            answer = await AsyncHTTPClient().fetch(page, raise_error=False)
            self.assertEqual(answer.code, status)
        await until(lambda: client.position >= 10 and " 400 GET " in first.err())
        self.assertRegex(first.err(), r"\A.* 1 in all\n.* 404 GET / .*\n.* 400 GET .*\n\Z")
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

    async def test_lost_consumer_and_purged_stream(self) -> None:
        """A server goes on after a lost consumer and a purge, and ends when the stream is anew."""
        await self.start_broker()
        taken = self.start("broker", "--broker", self.broker, "serve", "--port", self.port)
        await self.ends(taken, 1, r"cannot serve on .*\n")
        server, url = await self.serve_stream()
        client = self.recorder(url)
        for numbers in range(5), range(5, 20):
            for number in numbers:
                await self.jetstream.publish("samples", b"%d" % number)
            if 0 in numbers:
                await until(lambda: client.position == 5)
                for consumer in await self.jetstream.consumers_info("samples"):
                    await self.jetstream.delete_consumer("samples", consumer.name)
        await self.jetstream.purge_stream("samples", keep=5)
        await until(lambda: client.position == 20)  # it notices after some 20 s
        await self.jetstream.delete_stream("samples")
        await self.jetstream.add_stream(name="samples")
        self.assertEqual((client.samples, client.missed), ([*range(5), *range(15, 20)], 10))
        anew = "error: the stream was made anew: start this server again"
        await self.ends(server, 1, rf"(.*\n)*.*{anew}\n")
        await self.connection.close()


@needs("websockets", "websocket")
class OtherLibrariesTests(RecipeCase):
    async def assert_counted(self, clients: list[Program], *counts: int) -> None:
        """Wait until all clients have counted so much."""
        line = "ones {}  trials {}  missed {}\n".format(*counts)
        await until(lambda: all(client.out().endswith(line) for client in clients))

    async def test_count_each_sample_once_through_a_drop(self) -> None:
        """A message of 2 MB, and what comes before, during and after a drop, is counted once."""
        clients = [self.copy("other_libraries", name, "--url", self.url) for name in LIBRARIES]
        await until(lambda: len(self.server.clients) == len(clients))
        self.server.send_message(["x" * 2_000] * (self.server.message_size - 1))
        samples = tosses(1, 0.72, 120)
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
        self.assertEqual(queries, [f"epoch={self.server.epoch}&offset=1119"] * 2)
        await self.interrupt(*clients)
        refused = r"(.* not 0 or 1: 'x{79}\n){999}"
        for client in clients:
            self.assertRegex(
                client.err(), rf"\A{refused}(.*; next try in .* s\n){{3}}.* missed 15 .*\n\Z"
            )
