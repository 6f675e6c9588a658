"""The names, options, sizes, formulas and transcripts of README.md hold, and so do its links.

What the recipes do is tested beside them; what the tables of measurements say is not tested.
"""

import ast
import inspect
import math
import re
import unittest

import client
import server
from client import BetaBinomial, WebSocketClient
from server import WebSocketServer
from tests.support import ROOT, TIMEOUT, first_line, running

README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines_of_code(source: str) -> int:
    """Count the lines of a script that are neither blank, nor comment, nor docstring."""
    lines = {n: line.strip() for n, line in enumerate(source.splitlines(), 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines |= dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), "")
    return sum(line != "" and line[0] != "#" for line in lines.values())


class ReadmeTests(unittest.TestCase):
    def test_first_command_comes_early(self) -> None:
        """The first command stands by line 15, and the whole has at most 300 lines."""
        self.assertLessEqual(README[: README.index("```sh\n")].count("\n") + 2, 15)
        self.assertLessEqual(len(README.splitlines()), 300)

    def test_files_exist(self) -> None:
        """Every file that README.md or tests/README.md names is in the tree."""
        for base in (ROOT, ROOT / "tests"):
            text = (base / "README.md").read_text(encoding="utf-8")
            links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
            files = re.findall(r"(?<![\w/.])((?:tests/)?[\w/]+\.(?:py|txt))\b", text)
            self.assertTrue(links)
            self.assertTrue(files)
            for name in {*links, *files} - {"posterior.txt"}:
                places = (base, ROOT, ROOT / "tests", ROOT / "tests" / "recipes")
                found = [place for place in places if (place / name).exists()]
                self.assertTrue(found, f"{name} in {base}")

    def test_every_recipe_has_a_row(self) -> None:
        """The table names every recipe that can be run, and none that is not there."""
        table = README.partition("\n## Make it yours\n")[2].partition("\n## ")[0]
        stated = set(re.findall(r"tests/recipes/(\w+)\.py", table))
        files = {path.stem for path in (ROOT / "tests" / "recipes").glob("*.py")} - {"__init__"}
        self.assertEqual(stated, files)

    def test_source_and_model_of_ones_own_are_programs(self) -> None:
        """The source sends its prices, and ends the server when it fails; the model follows it."""
        source, model = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        source = source.replace("port=8765", "port=0")
        with running("-c", source.replace("101.4", "1 / 0")) as process:
            _, errors = process.communicate(timeout=TIMEOUT)
            self.assertIn("ZeroDivisionError", errors)
            self.assertEqual(process.returncode, 1)
        with (
            running("-c", source) as process,
            running("-c", model, "--url", first_line(process)) as follower,
        ):
            lines = (first_line(follower) for _ in range(TIMEOUT))
            self.assertIn("highest 101.7  missed 0", lines)

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
            public = {
                name
                for name, thing in vars(module).items()
                if getattr(thing, "__module__", "") == module.__name__ and name[0] != "_"
            }
            self.assertEqual({name for name, file in rows if file == module.__name__}, public)

    def test_numbers_hold(self) -> None:
        """The sizes, the true p, the URL and the waits between tries are those of the code."""
        self.assertIn(f"the newest {WebSocketServer.history_size:,} samples", README)
        self.assertIn(f"at most {WebSocketServer.message_size:,} samples at a time", README)
        self.assertIn("around the true 0.72", README)
        self.assertIn("default=0.72", inspect.getsource(server.main))
        self.assertIn('default="ws://localhost:8765/websocket"', inspect.getsource(client.main))
        delay = inspect.signature(WebSocketClient).parameters["retry_delay"].default
        waits = [min(30, delay * 2**attempt) for attempt in range(5)]
        self.assertIn("up to {} s, then {}, {}, {}, {}".format(*waits), README)

    def test_statistics_hold(self) -> None:
        """The formulas, and the sd after 600 trials, are what BetaBinomial gives."""
        a, b = posterior = BetaBinomial().update([1] * 432 + [0] * 168)
        self.assertEqual(posterior, (1 + 432, 1 + 600 - 432))
        self.assertAlmostEqual(posterior.sd, math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))))
        self.assertIn(f"about {posterior.sd:.3f}", README)
        self.assertAlmostEqual(posterior.sd / BetaBinomial(4 * a, 4 * b).sd, 2, places=2)

    def test_transcripts_add_up(self) -> None:
        """Each line of the transcripts is one that the client prints for these counts."""
        lines = re.findall(r"^ *(▕.*▏ Beta\((\d+), (\d+)\).*)$", README, re.MULTILINE)
        self.assertGreaterEqual(len(lines), 6)
        shown = WebSocketClient("ws://localhost/")
        for line, alpha, beta in lines:
            shown.posterior = BetaBinomial(int(alpha), int(beta))
            self.assertEqual(line, str(shown))

    def test_promise_is_the_protocols(self) -> None:
        """The promise stands there in its exact words."""
        promise = (
            "Within one run of the server, each sample is counted exactly once while the history "
            "covers the gap; otherwise the client says how many it missed. When the server has "
            "begun anew, the client says that too."
        )
        self.assertIn(promise, " ".join(README.split()))


class TreeTests(unittest.TestCase):
    def test_scripts_are_small_and_alone(self) -> None:
        """Each is read at one sitting, imports nothing from the other, and needs only Tornado."""
        sizes = ("server.py", "client", 140, 185), ("client.py", "server", 180, 240)
        for name, other, code, lines in sizes:
            source = (ROOT / name).read_text(encoding="utf-8")
            self.assertLessEqual(lines_of_code(source), code, name)
            self.assertLessEqual(len(source.splitlines()), lines, name)
            self.assertNotRegex(source, rf"(?m)^(from|import) {other}")
        self.assertEqual((ROOT / "requirements.txt").read_text(), "tornado>=6.6,<7\n")
