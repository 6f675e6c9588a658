"""Whatever the README states about the pair, holds."""

import inspect
import math
import re
import unittest

import client
import server
from client import BetaBinomial, WebSocketClient
from server import WebSocketServer
from tests.support import ROOT, readme_blocks
from tests.test_scripts import LINE

README = (ROOT / "README.md").read_text(encoding="utf-8")


class ReadmeTests(unittest.TestCase):
    def test_first_command_comes_early(self) -> None:
        """The first command stands by line 15."""
        self.assertLessEqual(README[: README.index("```sh\n")].count("\n") + 2, 15)

    def test_commands_name_files_that_exist(self) -> None:
        """Every .py and .txt file in a command is in the tree."""
        recipes = re.compile(r"^## Make it yours$.*?(?=^## )", re.MULTILINE | re.DOTALL)
        text = recipes.sub("", README)  # these name files that the reader saves
        commands = re.findall(r"```sh\n(.*?)```|`([^`\n]*\.py[^`\n]*)`", text, re.DOTALL)
        files = re.findall(r"[\w/]+\.(?:py|txt)\b", " ".join(map(" ".join, commands)))
        self.assertIn("server.py", files)
        for name in set(files) - {"posterior.txt"}:
            self.assertTrue((ROOT / name).exists(), name)

    def test_options_exist(self) -> None:
        """Every option after server.py or client.py is one of that script."""
        for script, module in (("server.py", server), ("client.py", client)):
            source = inspect.getsource(module.main)
            options = re.findall(rf"{re.escape(script)}((?: --\w+ [^\s`]+)+)", README)
            self.assertTrue(options)
            for option in re.findall(r"--\w+", "".join(options)):
                self.assertIn(f'"{option}"', source)

    def test_names_exist(self) -> None:
        """Each row of the table of names is a name in its file, and each public name has a row."""
        rows = re.findall(r"^\| `(\w+)` \| `(\w+)\.py` \|", README, re.MULTILINE)
        for module in (server, client):
            stated = {name for name, file in rows if file == module.__name__}
            public = {
                name
                for name, thing in vars(module).items()
                if getattr(thing, "__module__", "") == module.__name__
            }
            self.assertEqual(stated, public)
        for name in ("send_message", "catch_up", "written", "history_size", "max_clients"):
            self.assertTrue(hasattr(WebSocketServer, name))
        for name in ("_receive", "run", "on_message"):
            self.assertTrue(hasattr(WebSocketClient, name))

    def test_default_url_is_the_same_everywhere(self) -> None:
        """The README, the client's default and the server's defaults give one URL."""
        url = "ws://localhost:8765/websocket"
        self.assertTrue(readme_blocks("Run it", "text")[0].startswith(f"{url}\n"))
        self.assertIn(f'default="{url}"', inspect.getsource(client.main))
        source = inspect.getsource(server.main)
        self.assertIn('"--address", default="localhost"', source)
        self.assertIn('"--port", type=int, default=8765', source)

    def test_numbers_hold(self) -> None:
        """The history's size, the true p, and the waits between tries are those of the code."""
        self.assertIn(f"the newest {WebSocketServer.history_size:,} samples", README)
        self.assertIn("around the true 0.72", README)
        self.assertIn("default=0.72", inspect.getsource(server.main))
        threshold = "gc.set_threshold(50_000)"
        benchmark = (ROOT / "tests" / "benchmark.py").read_text(encoding="utf-8")
        for text in (README, inspect.getsource(server.main), benchmark):
            self.assertIn(threshold, text)
        delay = inspect.signature(WebSocketClient).parameters["retry_delay"].default
        waits = [min(30, delay * 2**attempt) for attempt in range(5)]
        self.assertIn("up to {} s, then {}, {}, {}, {}".format(*waits), README)
        n, s = 600, round(0.72 * 600)
        self.assertIn(f"about {BetaBinomial(s, n).sd:.3f}", README)
        ratio = BetaBinomial(s, n).sd / BetaBinomial(4 * s, 4 * n).sd
        self.assertTrue(math.isclose(ratio, 2, rel_tol=0.01))

    def test_transcript_adds_up(self) -> None:
        """Each line of the transcript is one that the client prints for these counts."""
        lines = [
            match for block in readme_blocks("Run it", "text") for match in LINE.finditer(block)
        ]
        self.assertEqual(len(lines), 3)
        for line in lines:
            posterior = BetaBinomial(int(line["alpha"]) - 1, int(line["trials"]))
            shown = f"{posterior}  trials {posterior.trials}  missed 0"
            self.assertEqual(line[0], shown)
            picture = re.search(rf"{re.escape(shown)}  \|(.*)\|", README)
            assert picture is not None
            self.assertEqual(picture[1], posterior.density(len(picture[1])))

    def test_formulas_hold(self) -> None:
        """The formulas of the statistics give what BetaBinomial gives."""
        s, n = 432, 600
        a, b = 1 + s, 1 + n - s
        posterior = BetaBinomial(s, n)
        self.assertEqual((posterior.alpha, posterior.beta), (a, b))
        self.assertAlmostEqual(posterior.mean, a / (a + b))
        self.assertAlmostEqual(posterior.sd, math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))))

    def test_messages_are_those_of_the_protocol(self) -> None:
        """Each message in the diagram has an epoch, an offset, and samples."""
        messages = re.findall(r'\{"epoch".*?\}', readme_blocks("What happens", "mermaid")[0])
        self.assertEqual(len(messages), 3)
        for message in messages:
            self.assertRegex(
                message, r'^\{"epoch": "[0-9a-f]{8}", "offset": \d+, "samples": \[.*\]\}$'
            )

    def test_promise_is_the_protocols(self) -> None:
        """The promise stands there in its exact words."""
        promise = (
            "Each sample is counted exactly once within an epoch while the history covers the gap; "
            "otherwise the client says how many it missed"
        )
        self.assertIn(promise, " ".join(README.split()))


class TreeTests(unittest.TestCase):
    def test_requirements_are_one_line(self) -> None:
        """Tornado is the one dependency, and everything the scripts import else is in the library."""
        self.assertEqual((ROOT / "requirements.txt").read_text(), "tornado>=6.6,<7\n")

    def test_scripts_import_nothing_from_each_other(self) -> None:
        """Each script survives being copied alone."""
        self.assertNotRegex((ROOT / "server.py").read_text(), r"(?m)^(from|import) client")
        self.assertNotRegex((ROOT / "client.py").read_text(), r"(?m)^(from|import) server")


if __name__ == "__main__":
    unittest.main()
