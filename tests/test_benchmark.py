"""That the benchmark and the comparison of transports run and print their tables, untimed."""

import importlib.util
import subprocess
import sys
import unittest

from tests.support import ROOT


class BenchmarkTests(unittest.TestCase):
    def run_script(self, name: str, *options: str) -> str:
        command = [sys.executable, str(ROOT / "tests" / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_every_part_prints_its_table(self) -> None:
        """At a tiny size, each of the eight parts of the benchmark prints a table with our row."""
        printed = self.run_script("benchmark.py", "--tiny")
        parts = dict(part.split("**", 1) for part in printed.split("\n**")[1:])
        names = ["overload", "fan-out", "receiving", "slow-consumer", "end-to-end"]
        names += ["delay", "memory", "recovery"]
        self.assertEqual(list(parts), names)
        for name, table in parts.items():
            with self.subTest(part=name):
                self.assertRegex(table, r"(?m)^\|.*\bours\b.*\d.*\|$")

    def test_parts_are_chosen_by_name(self) -> None:
        """Only the part that is named runs, with the number of clients that is asked for."""
        printed = self.run_script("benchmark.py", "--tiny", "--clients", "2", "fan-out")
        self.assertEqual(printed.count("\n**"), 1)
        self.assertIn("clients: | 2 |", printed)
        for name, package in (
            ("websockets, broadcast", "websockets"),
            ("aiohttp", "aiohttp"),
            ("picows", "picows"),
            ("starlette, uvicorn", "uvicorn"),
        ):
            with self.subTest(peer=name):
                if importlib.util.find_spec(package) is None:
                    self.assertIn(f"{name} is left out: {package} is not installed.", printed)
                    self.skipTest(f"{package} is not installed")
                self.assertRegex(printed, rf"(?m)^\| {name} \| \d")

    def test_every_transport_has_a_row(self) -> None:
        """The comparison of transports prints bytes, times, delays and lines for each of five."""
        printed = self.run_script("transports.py", "--rounds", "1", "--seconds", "0.3")
        for name in (
            "WebSocket",
            "Server-Sent Events",
            "HTTP polling",
            "HTTP long polling",
            "plain TCP",
        ):
            with self.subTest(transport=name):
                self.assertRegex(printed, rf"(?m)^\| {name} (\| [\d.]+ ){{6}}\|$")
