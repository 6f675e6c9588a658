"""That the benchmark and the comparison of transports run, and print all their rows.

What the numbers are is not tested: the machine decides that.
"""

import asyncio
import importlib.util
import re
import subprocess
import sys
import unittest
from unittest import mock

from tests.benchmark import PARTS, hand_over
from tests.support import ROOT

LABELS = {
    "overload": [
        "2,000 samples/s, 5 clients: s late",
        "2,000 samples/s, 5 clients: % of the samples delivered",
        "2,000 samples/s, 5 clients: us per sample and client",
        "2,000 samples/s, 5 clients: MiB more",
    ],
    "fan-out": ["send to 20 clients: us per message and client"],
    "receiving": ["receive 10 in a message: us per sample"],
    "slow-consumer": ["on_message of 20 ms, 500 messages/s: s behind after 0.3 s"],
    "delay": [
        "5 clients, 50 messages/s: ms of delay, median",
        "5 clients, 50 messages/s: ms of delay, 99th percentile",
    ],
    "end-to-end": ["end to end, 50 in a message: share of the speed without a network"],
    "idle-client": ["an idle client: KiB"],
    "deaf-client": ["a client that does not read: MiB more after 0.3 s"],
    "recovery": [
        "3 clients after a restart: s until half are back",
        "3 clients after a restart: s until all are back",
        "3 clients after a restart: most in any 100 ms",
    ],
}


class BenchmarkTests(unittest.TestCase):
    def run_script(self, name: str, *options: str) -> str:
        command = [sys.executable, "-W", "error", str(ROOT / "tests" / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def test_every_part_prints_its_rows(self) -> None:
        """At a tiny size, overload comes first, and each row has a number for all whom it is of."""
        printed = self.run_script("benchmark.py", "--tiny")
        found: dict[str, dict[str, str]] = {}
        for lines in re.findall(r"(?:^\|.*\n)+", printed, re.MULTILINE):
            (_, *names), _, *rows = (line[2:-2].split(" | ") for line in lines.splitlines())
            found |= {label: dict(zip(names, cells, strict=True)) for label, *cells in rows}
        self.assertEqual([*found], [label for labels in LABELS.values() for label in labels])
        for part, labels in LABELS.items():
            for label in labels:
                numbers = [name for name, cell in found[label].items() if re.match(r"-?\d", cell)]
                self.assertEqual(numbers, PARTS[part][1], label)
        for name in "websockets", "aiohttp", "picows", "starlette":
            with self.subTest(peer=name):
                if importlib.util.find_spec(name) is None:
                    self.skipTest(f"{name} is not installed")
                self.assertRegex(found[LABELS["fan-out"][0]][name], r"^[\d.]+ \([\d.]+\)$")

    def test_overload_waits_for_the_last_sample(self) -> None:
        """The cost of a source that is too fast counts until all that it gave is delivered."""
        server = mock.AsyncMock()
        asyncio.run(hand_over(server, 1_000, 0.01))
        sends = [mock.call.send([1])] * 9 + [mock.call.send([0])]
        self.assertEqual(server.mock_calls, [*sends, mock.call.delivered.wait()])

    def test_every_transport_has_a_row(self) -> None:
        """The comparison of transports prints bytes, times, delays and lines for each of five."""
        printed = self.run_script("transports.py", "--rounds", "1", "--seconds", "0.3")
        names = "WebSocket", "Server-Sent Events", "HTTP polling", "HTTP long polling", "plain TCP"
        for name in names:
            with self.subTest(transport=name):
                self.assertRegex(printed, rf"(?m)^\| {name} (\| [\d,.]+ ){{6}}\|$")
