"""Stream a column of a CSV file; a restart of the server goes on at the row where it was.

    python -m tests.recipes.numbered_source prices.csv price

It needs only Tornado. The offset of a sample is its row number, the epoch the file's name. How
many rows were sent is in a file beside it, prices.csv.count: delete it to begin again, and then
use a file of another name. A row without a finite number is sent as null, so that the numbers
stay right. Its limit: lines that were sent must never change.
"""

import asyncio
import csv
import math
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from server import WebSocketServer, make_app, run, serve


class Rows(WebSocketServer):
    """The stream of the rows."""


def read(path: Path, column: str) -> Iterator[float | None]:
    """Give the number in this column of each line after the header, None where there is none."""
    with path.open(newline="") as lines:
        index = next(csv.reader([next(lines, "")]), []).index(column)
        for line in lines:
            try:
                number = float(next(csv.reader([line]))[index])
            except (StopIteration, IndexError, ValueError, csv.Error):
                number = math.nan
            yield number if math.isfinite(number) else None


async def main() -> None:
    if len(sys.argv) != 3:
        print("usage: numbered_source.py FILE COLUMN", file=sys.stderr)
        sys.exit(2)
    path = Path(sys.argv[1]).absolute()
    count_file = path.with_name(path.name + ".count")
    rows = read(path, sys.argv[2])
    Rows.epoch = path.name  # the whole path would tell every client about this machine

    async def play(count: int) -> None:
        for row in rows:
            count += 1
            new = count_file.with_name(count_file.name + ".new")
            new.write_text(str(count))
            os.replace(new, count_file)  # first: no client may know more than the next run
            Rows.send_message([row])
            await asyncio.sleep(0.1)

    try:
        count = int(count_file.read_text()) if count_file.exists() else 0
        left = count
        while left and (chunk := list(islice(rows, min(left, 10_000)))):
            Rows.send_message(chunk)
            left -= len(chunk)
        async with asyncio.TaskGroup() as group:
            group.create_task(play(count))
            await serve(make_app(Rows))
    except (OSError, ValueError) as error:
        sys.exit(f"numbered_source.py: error: {error}")


if __name__ == "__main__":
    run(main())
