"""Stream the lines that another program appends to a file, such as a log or measurements.

    python -m tests.recipes.growing_file measurements.txt

Ctrl-C ends it. A sample is a line as text: follow it with mean_variance.py if it is a number. Lines
that are there at the start are not sent, and half a line waits for its end. The file may be missing
at first. If it is truncated or replaced under its name, as log rotation does, it is read from its
new start. It needs only Tornado.

Its limits: the file is read into memory once at the start; clients miss samples when more than
10,000 lines come at once; a file that is truncated, and grows longer than it was within 0.1 s, is
not noticed; a line of more than 10 million characters ends the program.
"""

import argparse
import asyncio
import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import BinaryIO

from server import WebSocketServer, make_app, run, serve


def new_lines(path: Path) -> Generator[list[str], None, None]:
    """Give, for ever, the lines that have ended since the last time; at first all there are."""
    while True:
        try:
            file = path.open("rb")
        except FileNotFoundError:
            yield []
            continue
        with file:
            rest = b""  # a line that has not ended yet
            replaced = False
            while not replaced:
                replaced = is_replaced(file, path)  # before the last lines of the old file are read
                if os.fstat(file.fileno()).st_size < file.tell():  # truncated
                    file.seek(0)
                    rest = b""
                *lines, rest = (rest + file.read()).split(b"\n")
                yield [line.decode(errors="replace").removesuffix("\r") for line in lines]


def is_replaced(file: BinaryIO, path: Path) -> bool:
    """Return whether the path leads to another file by now, and its writer has begun it."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return there.st_size > 0 and not os.path.samestat(there, os.fstat(file.fileno()))


async def follow(lines: Iterator[list[str]]) -> None:
    """Send the new lines, for ever."""
    for samples in lines:
        WebSocketServer.send_message(samples)
        await asyncio.sleep(0.1)


async def main() -> None:
    """Serve the lines until cancelled."""
    parser = argparse.ArgumentParser(description="Stream the lines of a file that grows.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one (%(default)s)")
    options = parser.parse_args()
    app = make_app()
    with contextlib.closing(new_lines(options.file)) as lines:
        next(lines)  # those that are there already are not sent
        async with asyncio.TaskGroup() as group:  # an exception in `follow` ends the program, too
            group.create_task(follow(lines))
            try:
                await serve(app, options.port)
            except ValueError as error:
                parser.error(str(error))


if __name__ == "__main__":
    run(main())
