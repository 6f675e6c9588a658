"""Stream the lines that another program appends to a file, such as a log or measurements.

    python -m tests.recipes.growing_file measurements.txt

Ctrl-C ends it. A sample is a line as text: follow it with mean_variance.py if it is a number. Lines
that are there at the start are not sent, and half a line waits for its end. A file that is
truncated or replaced under its name, as log rotation does, is read from its new start; it may also
be missing at first. It needs only Tornado. Its limits: a file that is truncated and grows longer
than it was within 0.1 s is not noticed, and clients miss samples when more than 10,000 lines come
at once.
"""

import argparse
import asyncio
import contextlib
import os
from collections.abc import Generator, Iterator
from pathlib import Path

from server import WebSocketServer, make_app, run, serve


def new_lines(path: Path) -> Generator[list[str], None, None]:
    """Give, for ever, the lines that have ended since the last time; at first all there are."""
    while not path.exists():
        yield []
    file, rest = path.open("rb"), b""
    try:
        while True:
            here, following = os.fstat(file.fileno()), None
            try:
                there = path.stat()
                # The old file is left only once the writer has begun the new one.
                if not os.path.samestat(here, there) and there.st_size:
                    following = path.open("rb")
            except OSError:
                pass  # it is being replaced
            if here.st_size < file.tell():  # truncated
                file.seek(0)
                rest = b""
            *lines, rest = (rest + file.read()).split(b"\n")
            if following:
                file.close()
                file, rest = following, b""
            yield [line.decode(errors="replace").removesuffix("\r") for line in lines]
    finally:
        file.close()


async def follow(lines: Iterator[list[str]]) -> None:
    for samples in lines:
        WebSocketServer.send_message(samples)
        await asyncio.sleep(0.1)


async def main() -> None:
    parser = argparse.ArgumentParser(description="Stream the lines of a file that grows.")
    parser.add_argument("file", type=Path)
    lines = new_lines(parser.parse_args().file)
    try:
        next(lines)  # those that are there already are not sent
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")
    with contextlib.closing(lines):
        async with asyncio.TaskGroup() as group:
            group.create_task(follow(lines))
            await serve(make_app())


if __name__ == "__main__":
    run(main())
