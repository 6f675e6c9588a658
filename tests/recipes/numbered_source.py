"""Stream a column of a CSV file; a restart of the server goes on at the row where it was.

    python -m tests.recipes.numbered_source prices.csv price

Ctrl-C ends it. It needs only Tornado, and a client that takes numbers and None, such as
mean_variance.py, which leaves None out. The offset of a sample is its row number, counted from 0
after the header, and the epoch is made from the file's name. How many rows were sent is in a file
beside it, prices.csv.count. If you delete that, all rows are sent again under the same numbers, and
a client that is ahead of them is refused until its row is there. To begin anew for all, give the
CSV file another name.

For a sample of several columns, replace `read_row`, for instance with

    return {"symbol": row["symbol"], "price": float(row[column])}

A bad row does not end the stream. If `read_row` raises a ValueError, or JSON cannot hold the result
(NaN), it is one line in the log with the number of the row, and the sample is null, so that all
other rows keep their numbers. An empty line is a row, too. Any source survives bad data like this:
check each sample where you still know where it came from.

Its limits: rows that were sent must never change, nor the column or `read_row`; two files of the
same name are the same stream; a file has one server. It survives a kill, but not always a power
failure (it does not call fsync).
"""

import argparse
import asyncio
import csv
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tornado.web import HTTPError

from server import Stream, WebSocketServer, make_app, run, serve

logger = logging.getLogger("source")


def read_row(row: dict[str, str], column: str) -> Any:
    """Make a sample of a row; ValueError if it is bad."""
    return float(row[column])


def read(lines: Iterable[str], column: str) -> Iterator[Any]:
    """Give a sample for each row after the header, None for a bad one; ValueError if no column."""
    rows = csv.reader(lines)
    header = next(rows, [])
    if column not in header:
        raise ValueError(f"there is no column {column!r} in {header!r:.80}")
    return samples(rows, header, column)


def samples(rows: Iterator[list[str]], header: list[str], column: str) -> Iterator[Any]:
    """Give a sample for each row, None for a bad one."""
    for number in itertools.count():
        try:
            cells = next(rows)
            sample = read_row(dict.fromkeys(header, "") | dict(zip(header, cells)), column)
            json.dumps(sample, allow_nan=False)  # as send_message will do
        except StopIteration:
            return
        except (csv.Error, TypeError, ValueError) as error:
            logger.warning("row %d is sent as null: %s", number, error)
            sample = None
        yield sample


class Rows(WebSocketServer):
    """A client of the rows."""

    def prepare(self) -> None:
        try:
            super().prepare()
        except HTTPError as error:
            if error.status_code == 400:
                error.reason = f"{error.reason}; if the count file was deleted, wait for your row"
            raise


def load(stream: Stream, rows: Iterator[Any], count_file: Path) -> int:
    """Put the rows into the stream that were sent before, and return how many they are."""
    text = count_file.read_text() if count_file.exists() else "0"
    if not text.isdecimal():
        raise ValueError(f"{count_file} must hold a count, not {text!r:.80}")
    count = int(text)
    sent = list(itertools.islice(rows, count))
    if len(sent) < count:
        raise ValueError(f"{count} rows were sent, but there are only {len(sent)} now")
    stream.append(sent)
    return count


async def play(rows: Iterator[Any], count: int, count_file: Path, interval: float) -> None:
    """Send one row after the other, an interval in seconds apart."""
    new = count_file.with_name(count_file.name + ".new")
    for number, sample in enumerate(rows, count + 1):
        await asyncio.sleep(interval)
        new.write_text(str(number))
        os.replace(new, count_file)  # first: no client may know more than the next run
        Rows.send_message([sample])


async def main() -> None:
    """Serve the rows until cancelled."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, help="in CSV, with a header")
    parser.add_argument("column", help="its name in the header")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    parser.add_argument("--interval", type=int, default=100, help="in milliseconds (%(default)s)")
    options = parser.parse_args()
    count_file = options.file.with_name(options.file.name + ".count")
    # Bytes that are not UTF-8 are replaced: they spoil a row, and not all that is read at once.
    with options.file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        async with asyncio.TaskGroup() as group:  # an exception in `play` ends the program, too
            try:
                if options.interval < 1:
                    raise ValueError("interval must be at least 1")
                rows = read(lines, options.column)
                app = make_app(Rows)
                Rows.stream.epoch = hashlib.sha256(os.fsencode(options.file.name)).hexdigest()[:8]
                count = load(Rows.stream, rows, count_file)
                group.create_task(play(rows, count, count_file, options.interval / 1000))
                await serve(app, options.port)
            except ValueError as error:
                parser.error(str(error))


if __name__ == "__main__":
    run(main())
