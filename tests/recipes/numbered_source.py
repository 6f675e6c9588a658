"""Stream a column of a CSV file; a restart of the server goes on at the row where it was.

    python -m tests.recipes.numbered_source prices.csv price

Ctrl-C ends it. It needs only Tornado, and a client whose `on_message` takes numbers and None. The
offset of a sample is its row number, counted from 0 after the header, and the epoch is the file's
name. How many rows were sent is in a file beside it, prices.csv.count. To begin again, give the
CSV file another name. A row without a finite number (an empty line is one, too) is
sent as null, so that the numbers stay right. Its limits: rows that were sent must never change, and
a file has one server. It survives a kill, but not always a power failure (it does not call fsync).
"""

import argparse
import asyncio
import csv
import math
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TextIO

from server import WebSocketServer, make_app, run, serve


class Rows(WebSocketServer):
    """The stream of the rows."""


def read(lines: TextIO, column: str) -> Iterator[float | None]:
    """Give the number in this column of each row after the header, None where there is none."""
    rows = csv.reader(lines)
    header = next(rows, [])
    if column not in header:
        raise ValueError(f"there is no column {column!r} in {header!r:.80}")
    return numbers(rows, header.index(column))


def numbers(rows: Iterator[list[str]], index: int) -> Iterator[float | None]:
    """Give the number at this index of each row, None where there is none."""
    while True:
        try:
            number = float(next(rows)[index])
        except StopIteration:
            return
        except (IndexError, ValueError, csv.Error):
            number = math.nan
        yield number if math.isfinite(number) else None


def load(rows: Iterator[float | None], count_file: Path) -> int:
    """Put the rows that were sent before into the log, and return how many they are."""
    text = count_file.read_text(errors="replace") if count_file.exists() else "0"
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise ValueError(f"{count_file} must hold a count, not {text!r:.80}")
    while chunk := list(islice(rows, min(int(text) - Rows.end, 1_000))):
        Rows.send_message(chunk)
    if Rows.end < int(text):
        raise ValueError(f"{text} rows were sent, but there are only {Rows.end} now")
    return Rows.end


async def play(rows: Iterator[float | None], count_file: Path, interval: float) -> None:
    """Send one row after the other, an interval in seconds apart."""
    new = count_file.with_name(count_file.name + ".new")
    for row in rows:
        new.write_text(str(Rows.end + 1))
        os.replace(new, count_file)  # first: no client may know more than the next run
        Rows.send_message([row])
        await asyncio.sleep(interval)


async def main() -> None:
    """Serve the rows until cancelled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="in CSV, with a header")
    parser.add_argument("column", help="its name in the header")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    parser.add_argument("--interval", type=int, default=100, help="in milliseconds (%(default)s)")
    options = parser.parse_args()
    problem: BaseException | None = None
    try:
        if options.interval < 1:
            raise ValueError("interval must be at least 1")
        # Other bytes are replaced: they spoil a row, and not all that is read at once.
        with options.file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            rows = read(lines, options.column)
            Rows.epoch = options.file.name  # the whole path would tell clients about this machine
            count_file = options.file.with_name(options.file.name + ".count")
            load(rows, count_file)
            async with asyncio.TaskGroup() as group:
                group.create_task(play(rows, count_file, options.interval / 1000))
                await serve(make_app(Rows), options.port)
    except* (OSError, ValueError, csv.Error) as errors:
        problem = errors.exceptions[0]
    if problem:  # here, since an exit inside of except* would be put into a group as well
        parser.exit(1 if isinstance(problem, OSError) else 2, f"{parser.prog}: error: {problem}\n")


if __name__ == "__main__":
    run(main())
