"""The recipes with other people's libraries: river, Jupyter, and other WebSocket clients."""

import importlib
import importlib.util
import random
import re
import signal
import unittest
from collections.abc import Callable
from subprocess import DEVNULL
from typing import Any
from unittest import mock

from tornado.ioloop import PeriodicCallback

from client import BetaBinomial
from tests.recipes import changing_coin
from tests.recipes.changing_coin import ChangeClient
from tests.recipes.other_libraries import Position
from tests.support import PATIENCE, ROOT, running, url_of
from tests.test_recipes_clients import URL, RecipeCase
from tests.test_rule import message


def needs(*modules: str) -> Callable[[Any], Any]:
    """Skip a test where one of these modules is missing."""
    found = all(importlib.util.find_spec(module) for module in modules)
    return unittest.skipUnless(found, f"needs {', '.join(modules)}: see tests/requirements.txt")


def tosses(seed: int) -> list[int]:
    """Toss a coin whose p changes from 0.3 to 0.7 after 1,000 samples, always in the same way."""
    coin = random.Random(seed)
    return coin.choices([0, 1], [7, 3], k=1000) + coin.choices([0, 1], [3, 7], k=500)


@needs("river")
class ChangeClientTests(RecipeCase):
    def take(self, client: ChangeClient, samples: list[Any], **fails: Any) -> list[int]:
        """Hand samples over as the next ones, and return the offsets that are in the log."""
        with mock.patch.object(changing_coin.logger, "warning", **fails) as warning:
            client.position += len(samples)
            client.on_message(samples)
        return [call.args[1] for call in warning.call_args_list]

    def test_change_is_noticed(self) -> None:
        """A step from 0.3 to 0.7 is noticed within 200 samples, and nothing where there is none."""
        for seed in range(20):
            samples, client = tosses(seed), ChangeClient(URL)
            self.assertEqual(self.take(client, samples[:900]), [])
            [noticed] = self.take(client, samples[900:])
            self.assertIn(noticed, range(1000, 1200))
            self.assertEqual(client.posterior, BetaBinomial().update(samples[noticed + 1 :]))

    def test_failure_on_the_way(self) -> None:
        """It changes nothing, so the same samples can come again."""
        client = ChangeClient(URL)
        self.assertRaises(OSError, self.take, client, tosses(0), side_effect=OSError)
        self.assertEqual((client.posterior, client.detector.width), (BetaBinomial(), 0))

    def test_new_run_and_bad_sample(self) -> None:
        """At a new run posterior and detector begin anew; what is not 0 or 1 is left out."""
        client = ChangeClient(URL)
        client.epoch = "first"
        self.take(client, [1] * 20)
        client.epoch = "second"
        self.assertEqual(self.take(client, [0, 2, 0]), [21])
        self.assertEqual((client.posterior, client.detector.width), (BetaBinomial(1, 3), 2))

    async def test_both_roles(self) -> None:
        """The client says where it noticed that the coin of the server has changed."""
        coin = "--p=0", "--then=1", "--after=200", "--interval=1", "--port=0"
        server = running("-m", "tests.recipes.changing_coin", "server", *coin)
        url = url_of(self.enterContext(server))
        with self.recipe("changing_coin", "client", "--url", url) as client:
            await self.shows("noticed a change at sample 2")
            client.send_signal(signal.SIGINT)
            await self.ends(client)


@needs("ipykernel", "jupyter_client", "matplotlib")
class NotebookTests(RecipeCase):
    async def start_kernel(self) -> None:
        """Start a kernel, and a client of it."""
        manager = importlib.import_module("jupyter_client.manager").AsyncKernelManager
        kernel = manager(transport="ipc", connection_file=str(self.path))
        options = [f"--ipython-dir={self.folder}"]
        await kernel.start_kernel(extra_arguments=options, cwd=str(ROOT), stderr=DEVNULL)
        self.addAsyncCleanup(kernel.shutdown_kernel, now=True)
        self.kernel = kernel.client()
        self.kernel.start_channels()
        self.addCleanup(self.kernel.stop_channels)
        await self.kernel.wait_for_ready(timeout=PATIENCE)

    async def run_cell(self, cell: str) -> list[tuple[str, str]]:
        """Run a cell, which must succeed; return the pictures that came, and where they belong."""
        request, seen, state = self.kernel.execute(cell), [], ("", "")
        while state != (request, "idle"):
            message = await self.kernel.get_iopub_msg(timeout=PATIENCE)
            content = message["content"]
            self.assertNotEqual(message["msg_type"], "error", content)
            state = message["parent_header"].get("msg_id"), content.get("execution_state")
            if "transient" in content:
                seen.append((content["data"]["image/png"], content["transient"]["display_id"]))
        return seen

    async def test_notebook(self) -> None:
        """The picture moves while another cell runs, until the sd is small; then it begins anew."""
        await self.start_kernel()
        text = (ROOT / "tests" / "recipes" / "notebook.py").read_text(encoding="utf-8")
        text = text.replace("ws://localhost:8765/websocket", self.url)
        head, first, look, last = re.split("^(?=# %%)", text, flags=re.MULTILINE)
        feeding = PeriodicCallback(lambda: self.handler.send_message([0, 1]), 5)
        await self.run_cell(head)
        shown = await self.run_cell(first)
        feeding.start()
        shown += await self.run_cell(f"{look}\nwhile client.position < 300: time.sleep(0.01)")
        self.assertGreater(len({picture for picture, _ in shown}), 2)
        self.assertEqual(len({place for _, place in shown}), 1)
        await self.run_cell("client.thread.join()\nassert client.posterior.sd <= ENOUGH")
        endless = first.replace("ENOUGH = 0.02", "ENOUGH = 0")
        await self.run_cell(f"{endless}\nwhile not client.connected: time.sleep(0.01)")
        await self.run_cell(endless)  # which ends the client before
        await self.run_cell(f"{last}\nassert not old.connected and not client.connected")
        feeding.stop()


@needs("websockets", "websocket")
class OtherLibrariesTests(RecipeCase):
    def test_rule(self) -> None:
        """What came before is left out, and a new run is followed from its start."""
        position = Position(URL)
        self.assertEqual(position.take(message(5, [5, 6])), [5, 6])
        self.assertEqual(position.take(message(6, [6, 7])), [7])
        with self.assertLogs("client"):
            self.assertEqual(position.take(message(1, [1], epoch="b")), [1])
        self.assertRaises(ConnectionAbortedError, position.take, message(-1, [1]))
        self.assertEqual((position.offset, position.missed), (2, 1))

    async def test_each_sample_is_counted_once(self) -> None:
        """A sample of 2 MB, a drop and a gap cost no sample more than the client says."""
        for library in "websockets", "websocket-client":
            await self.restart()
            self.stream.epoch, self.stream.history_size = "a file & more #1", 10
            self.handler.send_message(["x" * 2_000_000, 1, 0])
            command = "other_libraries", library, "--url", self.url
            with self.subTest(library), self.recipe(*command) as process:
                await self.shows("ones 1  trials 2  missed 0\n")
                (dropped,) = self.handler.clients
                dropped.close()
                self.handler.send_message([1] * 25)
                await self.shows("ones 11  trials 12  missed 15\n")
                (again,) = self.handler.clients
                query = [again.get_query_argument(name) for name in ("epoch", "offset")]
                self.assertEqual(query, ["a file & more #1", "3"])
                process.send_signal(signal.SIGINT)
                await self.ends(process)
