"""The programs that measure run, at a tiny size. What the numbers are, the machine decides."""

import math
import tempfile
import unittest
from xml.etree import ElementTree

from tests.measurements.benchmark import PARTS, PRESENT
from tests.measurements.chart import draw
from tests.measurements.contestants import CONTESTANTS
from tests.measurements.report import PYTHON, Row, take_turns
from tests.programs import running


class MeasurementTests(unittest.TestCase):
    def benchmark(self, *options: str) -> str:
        with running("-m", "tests.measurements.benchmark", "--tiny", *options) as process:
            printed, errors = process.communicate()
        self.assertEqual((process.returncode, errors), (0, ""))
        return printed

    def test_every_part_measures_whom_it_names(self) -> None:
        """Each row of each part has a number for each contestant that is installed."""
        for title, part in PARTS.items():
            for row, values in take_turns(part.measure, part.whom, part.tiny, 1).items():
                with self.subTest(part=title, row=row.label):
                    self.assertEqual(values.keys(), part.whom.keys())
                    self.assertTrue(all(math.isfinite(number) for (number,) in values.values()))
        if absent := CONTESTANTS.keys() - PRESENT.keys():
            self.skipTest(f"not installed, and so not measured: {', '.join(absent)}")

    def test_table_names_the_python_and_a_sentence_tells_of_the_machine(self) -> None:
        """The program prints a table of the parts that are named, and a sentence."""
        lines = self.benchmark("threads", "late-joiner").splitlines()
        heading, *rows = [line for line in lines if line.startswith("| ")]
        self.assertEqual((heading, len(rows)), (f"| {PYTHON} | ours |", 3))
        self.assertRegex(lines[-1], "^An empty loop .*[0-9.]+ s before .*[0-9.]+ s after")

    def test_chart_is_an_svg(self) -> None:
        """The program draws into the file that is named."""
        with tempfile.NamedTemporaryFile() as file:
            self.benchmark("--chart", file.name)
            self.assertTrue(ElementTree.parse(file.name).findall("{*}polyline"))

    def test_curve_ends_where_a_sample_is_too_late(self) -> None:
        """The last point of a curve is the first that was not waited for."""
        svg = ElementTree.fromstring(draw({"": [(1, 0.1), (10, math.inf), (100, math.inf)]}, 20))
        (curve,) = svg.findall("{*}polyline")
        self.assertEqual(len(curve.attrib["points"].split()), 2)

    def test_cell_has_the_median_and_the_ratio_to_ours(self) -> None:
        """The ratio is the median of the ratios, round by round."""
        values = {"ours": [1.0, 2.0, 4.0], "other": [3.0, 2.0, 4.0]}
        self.assertEqual(Row("", ratio=True).cell("other", values), "3.0 (1.00)")
