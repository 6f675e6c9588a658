"""An SVG of how late samples are, by how many there are per second; benchmark.py has the numbers."""

import math
from collections.abc import Iterator

Curves = dict[str, list[tuple[float, float]]]  # of each contestant: samples per second, seconds
LEFT, RIGHT, TOP, BOTTOM = 70, 590, 70, 350  # of the plane, on which both scales are logarithmic
TICKS = {0.001: "1 ms", 0.01: "10 ms", 0.1: "0.1 s", 1: "1 s", 10: "10 s"}
STYLES = ["#1f83d6", "#d9730d; stroke-dasharray: 8 4", "#8957e5; stroke-dasharray: 2 4"]
HEAD = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 400" role="img">
<title>How late the last sample is, against the number of samples per second</title>
<style>
  rect { fill: #fff } text { fill: #333; font: 13px sans-serif; text-anchor: middle }
  .grid { stroke: #ddd } .curve { fill: none; stroke-width: 2.5 } .name { text-anchor: start }
  @media (prefers-color-scheme: dark) {
    rect { fill: #0d1117 } text { fill: #ccc } .grid { stroke: #333 }
  }
</style>
<rect width="620" height="400"/>
<text x="330" y="22">how late the last sample is, at the last of 200 clients</text>
<text x="330" y="390">samples per second, for 2 s</text>"""


def draw(curves: Curves, latest: float) -> str:
    """Draw the curves; each ends where it is later than the latest that was waited for."""
    rates = [rate for curve in curves.values() for rate, _ in curve]
    slowest, fastest, soonest = min(rates), max(rates), 0.001

    def x(rate: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(rate / slowest) / math.log(fastest / slowest)

    def y(late: float) -> float:
        share = math.log(min(max(late, soonest), latest) / soonest) / math.log(latest / soonest)
        return BOTTOM - (BOTTOM - TOP) * share

    def lines() -> Iterator[str]:
        yield HEAD
        for late, label in TICKS.items():
            yield f'<path class="grid" d="M{LEFT} {y(late):.0f}H{RIGHT}"/>'
            yield f'<text x="{LEFT - 30}" y="{y(late) + 4:.0f}">{label}</text>'
        for rate in sorted(set(rates)):
            yield f'<text x="{x(rate):.0f}" y="{BOTTOM + 18}">{rate:,}</text>'
        for number, (name, curve) in enumerate(curves.items()):
            style = f'class="curve" style="stroke: {STYLES[number]}"'
            end = next((n for n, (_, late) in enumerate(curve) if late > latest), len(curve))
            points = " ".join(f"{x(rate):.0f},{y(late):.0f}" for rate, late in curve[: end + 1])
            yield f'<polyline {style} points="{points}"/>'
            legend = LEFT + 20 + 160 * number
            yield f'<path {style} d="M{legend} 46h40"/>'
            yield f'<text class="name" x="{legend + 48}" y="50">{name}</text>'
        yield "</svg>\n"

    return "\n".join(lines())
