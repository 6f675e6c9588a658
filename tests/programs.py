"""Scripts and recipes that a test runs as programs of their own."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any

from tests.support import PATIENCE, ROOT, ServedCase

URL = "ws://127.0.0.1:9/websocket"  # for clients that never start


@contextlib.contextmanager
def running(
    *command: str, python: bool = True, patience: float = PATIENCE, **outputs: Any
) -> Iterator[Popen[str]]:
    """Run Python, or another program, and pipe both outputs.

    It is killed at the end, and before if it takes too long: a read of its output ends then.
    """
    outputs = {"stdout": PIPE, "stderr": PIPE} | outputs
    usual = os.environ | {"PYTHONUNBUFFERED": ""}  # if it were set, a missing flush would not show
    program = [*((sys.executable, "-W", "error") if python else ()), *command]
    with Popen(program, text=True, cwd=ROOT, env=usual, **outputs) as process:
        watch = threading.Timer(patience, process.kill)
        watch.start()
        try:
            yield process
        finally:
            watch.cancel()
            process.kill()


def line_with(process: Popen[str], text: str) -> str:
    """Read the log of a process until a line has this text, and return it."""
    log = process.stderr or process.stdout  # where a program logs if both are one
    assert log
    lines = []
    for line in log:
        lines.append(line)
        if text in line:
            return line.rstrip("\n")
    raise AssertionError(f"the log ended without {text!r}: {''.join(lines)}")


def url_of(process: Popen[str]) -> str:
    """Read the log of a server until it names its URL."""
    return line_with(process, " serving ").split()[-1]


class RecipeCase(ServedCase):
    """A test with a stream, and with copies of the scripts and recipes in a folder of its own."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.path = self.folder / "a#b & c.csv"  # for a file that the recipe reads or writes
        for file in *ROOT.glob("*.py"), *ROOT.glob("tests/recipes/*.*"):
            shutil.copy(file, self.folder)

    def recipe(self, name: str, *options: object) -> AbstractContextManager[Popen[str]]:
        """Run the copy of a recipe until the block ends, which kills it."""
        return running(str(self.folder / f"{name}.py"), *map(str, options), stderr=STDOUT)

    async def shows(self, process: Popen[str], text: str) -> str:
        """Wait until a recipe writes a line with this text, and return the line."""
        return await asyncio.to_thread(line_with, process, text)

    async def url_of(self, process: Popen[str]) -> str:
        """Wait until a recipe serves, and return its URL."""
        return await asyncio.to_thread(url_of, process)

    async def ends(self, process: Popen[str], status: int = 0) -> str:
        """See that a recipe ends, and quietly; return what it has written since the last line."""
        assert process.stdout
        rest = await asyncio.to_thread(process.stdout.read)
        self.assertNotRegex(rest, "Traceback|Exception ignored")
        self.assertEqual(process.wait(), status, rest)
        return rest

    async def interrupt(self, process: Popen[str], status: int = 0) -> str:
        """Press Ctrl-C, and then see what `ends` sees."""
        process.send_signal(signal.SIGINT)
        return await self.ends(process, status)

    async def refuses(self, reason: str, name: str, *options: object) -> None:
        """See that a recipe ends with its usage, one line with the reason, and status 2."""
        with self.subTest(reason), self.recipe(name, *options) as process:
            usage = rf"\Ausage: .*\n( .*\n)*\S+: error: {reason}\n\Z"
            self.assertRegex(await self.ends(process, 2), usage)
