"""What the programs that measure have in common: the machine, rounds in turns, tables."""

import contextlib
import importlib.metadata
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

PYTHON = f"Python {platform.python_version()}"


class Row(NamedTuple):
    """A row of a table."""

    label: str
    digits: int = 1
    ratio: bool = False  # whether to add the median of the ratios to ours in the same round

    def cell(self, name: str, values: dict[str, list[float]]) -> str:
        """Write the median of what was measured of a contestant, and how it compares to ours."""
        if name not in values:
            return ""
        median = statistics.median(values[name])
        if math.isinf(median):
            return "too late"
        text = f"{median:,.{self.digits}f}"
        if name == "ours" or not self.ratio:
            return text
        pairs = zip(values[name], values["ours"], strict=False)  # some take fewer rounds than ours
        return f"{text} ({statistics.median(a / b for a, b in pairs):.2f})"


Found = dict[Row, dict[str, list[float]]]  # what was measured of each contestant, round by round
Rounds = Iterator[dict[Row, float]]  # each with a number for each row, until it has enough


def take_turns(
    measure: Callable[..., Rounds], whom: dict[str, Any], sizes: tuple[float, ...], rounds: int
) -> Found:
    """Measure one contestant after the other, round by round."""
    found: Found = {}
    measuring = {name: measure(who, *sizes) for name, who in whom.items()}
    for number in range(1, rounds + 1):
        for name, one in measuring.items():
            progress(f"{measure.__name__}{sizes}, round {number} of {rounds}: {name}")
            for row, value in next(one, {}).items():
                found.setdefault(row, {}).setdefault(name, []).append(value)
    progress("")
    return found


def progress(text: str) -> None:
    """Show in one line what is being measured, if anybody watches."""
    if sys.stderr.isatty():
        print(f"\r{text[:79]:79}\r", end="", file=sys.stderr, flush=True)


def table(found: Found, names: Iterable[str]) -> None:
    """Print a Markdown table, with a column for each of those names that was measured."""
    measured = [name for name in names if any(name in values for values in found.values())]
    print("|", " | ".join([PYTHON, *measured]), "|")
    print("|---" + "|---:" * len(measured) + "|")
    for row, values in found.items():
        print("|", " | ".join([row.label, *(row.cell(name, values) for name in measured)]), "|")
    print()


@contextlib.contextmanager
def machine(modules: Iterable[str]) -> Iterator[None]:
    """Print what is measured, and afterwards how the machine was."""
    packages = importlib.metadata.packages_distributions()
    used = dict.fromkeys(packages[module][0] for module in modules)
    names = [f"{name} {importlib.metadata.version(name)}" for name in used]
    print(", ".join([PYTHON, f"{os.cpu_count()} cores", platform.system(), *names]) + ".\n")
    load, before = os.getloadavg()[0], empty_loop()
    yield
    print(f"An empty loop of ten million turns took {before:.2f} s before this, and", end=" ")
    print(f"{empty_loop():.2f} s after it; the load average before it was {load:.1f}.")


def empty_loop() -> float:
    """Return how long a loop takes that does nothing, ten million times."""
    begun = time.perf_counter()
    for _ in range(10_000_000):
        pass
    return time.perf_counter() - begun


def memory(pid: int, field: str = "VmRSS") -> float:
    """Return the MiB that a process occupies, or has occupied at most: VmHWM."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def processor_time(pid: int) -> float:
    """Return the seconds of processor time that a process has used, to a hundredth."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
