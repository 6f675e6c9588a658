"""That the benchmark and the comparison of transports run, and print all their rows.

What the numbers are is not tested: the machine decides that.
"""

import importlib.util
import re
import subprocess
import sys
import unittest

from tests.support import ROOT


class BenchmarkTests(unittest.TestCase):
    def run_script(self, name: str, *options: str) -> str:
        command = [sys.executable, "-W", "error", str(ROOT / "tests" / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_every_part_prints_its_rows(self) -> None:
        """At a tiny size, overload comes first, and each row has a number for us and every peer."""
        printed = self.run_script("benchmark.py", "--tiny")
        overload, rest = re.findall(r"(?:^\|.*\n)+", printed, re.MULTILINE)
        self.assertEqual(len(re.findall(r"(?m)^\| 2,000 samples/s, .* \| -?\d", overload)), 4)
        labels = "send to", "receive 10", "on_message", "5 clients, .* 99th", "end to end"
        for label in labels:
            self.assertRegex(rest, rf"(?m)^\| {label}.* \| \d")
        for label in "an idle client", "a client that does not read", "3 clients after":
            self.assertRegex(rest, rf"(?m)^\| {label}.* \| -?\d")
        sending = next(line for line in rest.splitlines() if "send to" in line)
        heading = rest.splitlines()[0].split(" | ")
        for name in "websockets", "aiohttp", "picows", "starlette":
            with self.subTest(peer=name):
                if importlib.util.find_spec(name) is None:
                    self.skipTest(f"{name} is not installed")
                self.assertRegex(sending.split(" | ")[heading.index(name)], r"^[\d.]+ \([\d.]+\)")

    def test_every_transport_has_a_row(self) -> None:
        """The comparison of transports prints bytes, times, delays and lines for each of five."""
        printed = self.run_script("transports.py", "--rounds", "1", "--seconds", "0.3")
        names = "WebSocket", "Server-Sent Events", "HTTP polling", "HTTP long polling", "plain TCP"
        for name in names:
            with self.subTest(transport=name):
                self.assertRegex(printed, rf"(?m)^\| {name} (\| [\d,.]+ ){{6}}\|$")
