"""The recipes that need other people's mathematics: a coin that changes, and a notebook."""

import contextlib
import os
import random
import re
import subprocess
import sys
import tempfile
import unittest
from collections.abc import AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

from tornado.ioloop import PeriodicCallback
from tornado.testing import gen_test

from client import BetaBinomial
from tests.recipes.changing_coin import ChangeClient, log
from tests.support import ROOT, TIMEOUT, PairCase, Recorder, first_line, until, wait_until

KERNEL = all(map(find_spec, ["ipykernel", "jupyter_client", "matplotlib"]))
URL = "ws://localhost:8765/websocket"


def tosses(seed: int, p: float, number: int) -> list[int]:
    """Toss a coin that falls in the same way every time."""
    coin = random.Random(seed)
    return [int(coin.random() < p) for _ in range(number)]


class ChangingCoinTests(unittest.TestCase):
    """A coin whose p changes in mid-stream."""

    def test_server_changes(self) -> None:
        """The program's coin has its second p after so many samples; it ends with clients told."""
        command = [sys.executable, "-W", "error", "-m", "tests.recipes.changing_coin", "server"]
        command += ["--p=0", "--then=1", "--after=5", "--interval=1", "--port=0"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
        self.enterContext(process)
        self.addCleanup(process.kill)
        client = Recorder(first_line(process))
        self.addCleanup(client.stop)
        with self.assertLogs("client") as logged:
            client.start()
            wait_until(lambda: len(client.samples) > 10)
            process.terminate()
            _, story = process.communicate()
            wait_until(lambda: "going away" in str(logged.output))
            client.stop()
        self.assertEqual(client.samples[:10], [0] * 5 + [1] * 5)
        self.assertEqual(process.returncode, 0)
        self.assertNotIn("Traceback", story)


@unittest.skipUnless(find_spec("river"), "needs river: see tests/requirements.txt")
class ChangeClientTests(PairCase):
    """A client that notices when p changes."""

    def take(self, client: ChangeClient, samples: list[int], size: int) -> list[int]:
        """Hand the samples over, so many at a time, and return where changes were noticed."""
        with mock.patch.object(log, "warning") as warning:
            for begin in range(0, len(samples), size):
                client.on_message(samples[begin : begin + size])
                client.position += len(samples[begin : begin + size])
        return [call.args[1] for call in warning.call_args_list]

    def test_change_is_noticed(self) -> None:
        """A step from 0.3 to 0.7 is noticed within 200 samples, however many come at a time."""
        for seed in range(20):
            samples = tosses(seed, 0.3, 1000) + tosses(100 + seed, 0.7, 500)
            for size in 1, 7, 1500:
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

    @gen_test
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
        self.assertEqual(client.posterior, BetaBinomial(1, 6))
        self.assertEqual(client.detector.width, 5)


@unittest.skipUnless(KERNEL, "needs ipykernel and matplotlib: see tests/requirements.txt")
class NotebookTests(PairCase):
    """The notebook, cell by cell, in a real kernel."""

    @contextlib.asynccontextmanager
    async def kernel(self) -> AsyncIterator[None]:
        """Start a kernel, and kill it at the end."""
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager

        text = (ROOT / "tests/recipes/notebook.py").read_text().replace(URL, self.url)
        self.cells = re.split("^(?=# %%)", text, flags=re.MULTILINE)[1:]
        folder = self.enterContext(tempfile.TemporaryDirectory())
        manager = AsyncKernelManager(
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),  # this interpreter's own kernel
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
            self.assertNotEqual(message["msg_type"], "error", message["content"])
            parent, content = message["parent_header"], message["content"]
            state = parent.get("msg_id"), content.get("execution_state")
            published.append(message)
        return published

    async def pictures(self, cell: str) -> list[tuple[str, str]]:
        """Run a cell, and return the pictures that came, each with the place where it is shown."""
        messages = [m for m in await self.run_cell(cell) if m["msg_type"].endswith("display_data")]
        contents = [message["content"] for message in messages]
        return [(c["data"]["image/png"], c["transient"]["display_id"]) for c in contents]

    @gen_test(timeout=20 * TIMEOUT)
    async def test_notebook(self) -> None:
        """The picture moves while another cell runs, stops by itself, and can begin anew."""
        wait = "drawn = client.drawn\nwhile client.drawn == drawn: time.sleep(0.01)\n"
        toss = PeriodicCallback(lambda: self.server.send_message([0, 1]), 10)
        clients = self.server.clients
        async with self.kernel():
            first, look, last = self.cells
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
