"""That the benchmark and the comparison of transports run, and print all their rows.

What the numbers are is not tested: the machine decides that.
"""

import asyncio
import importlib.util
import re
import unittest
from unittest import mock

from tests.benchmark import PARTS, hand_over
from tests.support import running

# How the labels of each part's rows end, in the order in which they are printed.
ROWS = {
    "overload": ["s late", "% of the samples delivered", "us per sample and client", "MiB more"],
    "fan-out": ["send to 20 clients: us per message and client"],
    "receiving": ["receive 10 in a message: us per sample"],
    "slow-consumer": ["s behind after 0.3 s"],
    "delay": ["ms of delay, median", "ms of delay, 99th percentile"],
    "end-to-end": ["share of the speed without a network"],
    "idle-client": ["an idle client: KiB"],
    "deaf-client": ["MiB more after 0.3 s"],
    "recovery": ["s until half are back", "s until all are back", "most in any 100 ms"],
}


class BenchmarkTests(unittest.TestCase):
    def run_script(self, *arguments: str) -> str:
        with running(*arguments) as process:
            printed, errors = process.communicate()
        self.assertEqual(process.returncode, 0, errors)
        return printed

    def test_every_part_prints_its_rows(self) -> None:
        """At a tiny size, overload comes first, and each row has a number for all whom it is of."""
        printed = self.run_script("tests/benchmark.py", "--tiny")
        found: dict[str, dict[str, str]] = {}
        for lines in re.findall(r"(?:^\|.*\n)+", printed, re.MULTILINE):
            (_, *names), _, *rows = (line[2:-2].split(" | ") for line in lines.splitlines())
            found |= {label: dict(zip(names, cells, strict=True)) for label, *cells in rows}
        rows = [(part, end) for part, ends in ROWS.items() for end in ends]
        for (label, cells), (part, end) in zip(found.items(), rows, strict=True):
            self.assertRegex(label, rf"{end}$")
            numbers = [name for name, cell in cells.items() if re.match(r"-?\d", cell)]
            self.assertEqual(numbers, PARTS[part][1], label)
        for name in "websockets", "aiohttp", "picows", "starlette":
            with self.subTest(peer=name):
                if importlib.util.find_spec(name) is None:
                    self.skipTest(f"{name} is not installed")
                cell = found[ROWS["fan-out"][0]][name]
                self.assertRegex(cell, r"^[\d.]+ \([\d.]+\)$")

    def test_overload_waits_for_the_last_sample(self) -> None:
        """The cost of a source that is too fast counts until all that it gave is delivered."""
        server = mock.AsyncMock()
        asyncio.run(hand_over(server, 1_000, 0.01))
        sends = [mock.call.send([1])] * 9 + [mock.call.send([0])]
        self.assertEqual(server.mock_calls, [*sends, mock.call.delivered.wait()])

    def test_every_transport_has_a_row(self) -> None:
        """The comparison of transports prints bytes, times, delays and lines for each of five."""
        printed = self.run_script("tests/transports.py", "--rounds", "1", "--seconds", "0.3")
        names = "WebSocket", "Server-Sent Events", "HTTP polling", "HTTP long polling", "plain TCP"
        for name in names:
            with self.subTest(transport=name):
                self.assertRegex(printed, rf"(?m)^\| {name} (\| [\d,.]+ ){{6}}\|$")
