"""The recipes with other people's libraries: river, Jupyter, and other WebSocket clients."""

import importlib
import random
import re
from subprocess import DEVNULL
from typing import Any

from client import BetaBinomial
from tests.programs import URL, RecipeCase
from tests.recipes import changing_coin
from tests.recipes.other_libraries import Position
from tests.support import PATIENCE, ROOT, message, needs


@needs("river")
class ChangeClientTests(RecipeCase):
    def setUp(self) -> None:
        super().setUp()
        self.client = changing_coin.ChangeClient(URL)

    def take(self, samples: list[Any]) -> None:
        """Hand samples over as the next ones."""
        self.client.position += len(samples)
        self.client.on_message(samples)

    def test_change_is_noticed(self) -> None:
        """A step from 0.3 to 0.7 is noticed within 200 samples, and nothing where there is none."""
        for seed in range(20):
            self.client = changing_coin.ChangeClient(URL)
            coin = random.Random(seed)
            samples = coin.choices([0, 1], [7, 3], k=1000) + coin.choices([0, 1], [3, 7], k=500)
            with self.assertNoLogs("client"):
                self.take(samples[:1000])
            with self.assertLogs("client") as logged:
                self.take(samples[1000:])
            [line] = logged.output
            noticed = int(line.removeprefix("WARNING:client:noticed a change at sample "))
            self.assertLess(noticed, 1200)
            self.assertEqual(self.client.posterior, BetaBinomial().update(samples[noticed + 1 :]))

    def test_new_run_and_bad_sample(self) -> None:
        """At a new run posterior and detector begin anew; what is not 0 or 1 is left out."""
        self.client.epoch = "first"
        self.take([1] * 20)
        self.client.epoch = "second"
        with self.assertLogs("client") as logged:
            self.take([0, 2, 0])
        self.assertIn("refused sample 21", logged.output[0])
        self.assertEqual(self.client.posterior, BetaBinomial(1, 3))
        self.assertEqual(self.client.detector.width, 2)

    async def test_both_programs(self) -> None:
        """The client says where it noticed that the coin of the server has changed."""
        coin = "--p=0", "--then=1", "--after=200", "--interval=5", "--port=0"
        with self.recipe("changing_coin", "server", *coin) as server:
            url = await self.url_of(server)
            with self.recipe("changing_coin", "client", "--url", url) as client:
                await self.shows(client, "noticed a change at sample 2")
                await self.interrupt(client)


@needs("ipykernel", "jupyter_client", "matplotlib")
class NotebookTests(RecipeCase):
    async def asyncSetUp(self) -> None:
        """Start a kernel, and a client of it."""
        await super().asyncSetUp()
        manager = importlib.import_module("jupyter_client.manager").AsyncKernelManager
        kernel = manager(transport="ipc", connection_file=str(self.folder / "connection"))
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
            reply = await self.kernel.get_iopub_msg(timeout=PATIENCE)
            content = reply["content"]
            self.assertNotEqual(reply["msg_type"], "error", content)
            state = reply["parent_header"].get("msg_id"), content.get("execution_state")
            if "transient" in content:  # only a picture has that
                seen.append((content["data"]["image/png"], content["transient"]["display_id"]))
        return seen

    async def test_notebook(self) -> None:
        """The picture moves while another cell runs, until the sd is small; then it begins anew."""
        text = (ROOT / "tests" / "recipes" / "notebook.py").read_text(encoding="utf-8")
        text = text.replace("ws://localhost:8765/websocket", self.url)
        text = text.replace("PAUSE = 0.2", "PAUSE = 0")
        head, first, look, last = re.split("^(?=# %%)", text, flags=re.MULTILINE)
        await self.run_cell(head)
        shown = await self.run_cell(first)
        self.handler.send_message([0, 1] * 50)
        shown += await self.run_cell(f"{look}\nwhile client.position < 100: time.sleep(0.01)")
        self.handler.send_message([0, 1] * 400)
        shown += await self.run_cell("client.thread.join()\nassert client.posterior.sd <= ENOUGH")
        self.assertGreater(len({picture for picture, _ in shown}), 2)
        self.assertEqual(len({place for _, place in shown}), 1)
        endless = first.replace("ENOUGH = 0.02", "ENOUGH = 0")
        await self.run_cell(f"{endless}\nwhile not client.connected: time.sleep(0.01)")
        await self.run_cell(endless)  # which ends the client before
        await self.run_cell(f"{last}\nassert not old.connected and not client.connected")


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
            with self.subTest(library), self.recipe(*command) as client:
                await self.shows(client, "ones 1  trials 2  missed 0")
                (dropped,) = self.handler.clients
                dropped.close()
                self.handler.send_message([1] * 25)
                await self.shows(client, "ones 11  trials 12  missed 15")
                (again,) = self.handler.clients
                query = [again.get_query_argument(name) for name in ("epoch", "offset")]
                self.assertEqual(query, ["a file & more #1", "3"])
                await self.interrupt(client)
