"""What several test modules share: streams that are served, clients that record, programs."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import subprocess
import sys
import time
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from tornado.web import Application

from client import WebSocketClient
from server import WebSocketServer, make_app, serve

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 90  # seconds until a condition that does not come true fails a test; no measurement
HANDSHAKE = (
    b"GET /websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


async def until(condition: Callable[[], object], *values: Callable[[], object]) -> None:
    """Let the event loop run until the condition holds; otherwise the failure shows the values."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            seen = ", ".join(repr(value()) for value in values)
            raise AssertionError(f"line {condition.__code__.co_firstlineno} stayed false: {seen}")
        await asyncio.sleep(0.005)


def free_port() -> int:
    """Return a port that nobody listens on, for what cannot take a free one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def new_handler(
    handler: type[WebSocketServer] = WebSocketServer, **attributes: Any
) -> type[WebSocketServer]:
    """Return a class that no other test has served, and which has a stream of its own."""
    return type("Handler", (handler,), attributes)


class Recorder(WebSocketClient):
    """A client that keeps every sample, whatever it is, and the length of each list."""

    def __init__(self, url: str, retry_delay: float = 0.01) -> None:
        super().__init__(url, retry_delay)
        self.samples: list[Any] = []
        self.lengths: list[int] = []

    def on_message(self, samples: list[Any]) -> Any:
        self.lengths.append(len(samples))
        self.samples += samples


@contextlib.asynccontextmanager
async def following(*clients: WebSocketClient) -> AsyncIterator[None]:
    """Run clients in this event loop, and stop them at the end; each must end without an error."""
    tasks = [asyncio.create_task(client.run()) for client in clients]
    await asyncio.sleep(0)  # so that each of them has begun, and `stop` can end it
    try:
        yield
    finally:
        for client in clients:
            client.stop()
        await asyncio.gather(*tasks)


@contextlib.asynccontextmanager
async def serving(
    app: Application, port: int = 0, address: str = "127.0.0.1", **options: Any
) -> AsyncIterator[str]:
    """Serve an application as a program does, and yield the URL that is logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("server")
    logger.addHandler(handler)
    task = asyncio.create_task(serve(app, port, address, **options))
    try:
        await until(lambda: task.done() or any(line.startswith("serving ") for line in lines))
        if task.done():
            await task
        yield next(line.split()[1] for line in lines if line.startswith("serving "))
    finally:
        logger.removeHandler(handler)
        task.cancel()
        await asyncio.wait([task])


class LeftBehind(logging.Handler):
    """Keeps the log silent, and finds what no test may leave behind: tracebacks and warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or (record.name == "asyncio" and record.levelno >= logging.ERROR):
            self.found.append(self.format(record))

    def unraisable(self, problem: "sys.UnraisableHookArgs") -> None:
        """Take a warning that has become an error where nobody can catch it, as in __del__."""
        # The socket of a handshake that was broken off is the garbage collector's.
        left = ("<socket", "Unclosed WebSocketClientConnection")
        text = str(problem.exc_value)
        if isinstance(problem.exc_value, ResourceWarning) and any(name in text for name in left):
            return
        self.found.append(repr(problem.exc_value))


class QuietCase(unittest.IsolatedAsyncioTestCase):
    """A test in an event loop of its own that leaves no traceback and no warning."""

    def setUp(self) -> None:
        self.left_behind = LeftBehind()
        logging.getLogger().addHandler(self.left_behind)
        self.enterContext(mock.patch("sys.unraisablehook", self.left_behind.unraisable))
        self.addCleanup(self.check)  # while the hook is there, and after the cleanups of the test
        for name, level in (("server", logging.INFO), ("tornado.access", logging.CRITICAL)):
            logger = logging.getLogger(name)
            self.addCleanup(logger.setLevel, logger.level)
            logger.setLevel(level)

    def check(self) -> None:
        gc.collect()
        logging.getLogger().removeHandler(self.left_behind)
        self.assertEqual(self.left_behind.found, [])
        self.assertEqual(WebSocketServer.clients, set())


class ServedCase(QuietCase):
    """A test with a stream of its own, which is served at `self.url`."""

    sizes: ClassVar[dict[str, int]] = {}  # of the stream, such as history_size

    async def asyncSetUp(self) -> None:
        self.handler = new_handler()
        await self.begin()

    async def begin(self, port: int = 0) -> None:
        """Serve a new run of the stream."""
        app = make_app(self.handler)
        self.stream = self.handler.stream
        for name, size in self.sizes.items():
            setattr(self.stream, name, size)
        self.served = contextlib.AsyncExitStack()
        self.addAsyncCleanup(self.served.aclose)
        self.url = await self.served.enter_async_context(serving(app, port))
        self.port = int(self.url.split(":")[2].split("/")[0])

    async def restart(self) -> None:
        """End this run of the stream, and begin a new one at the same port."""
        await self.served.aclose()
        await self.begin(self.port)


@contextlib.contextmanager
def running(*command: str, python: bool = True, **outputs: Any) -> Iterator[subprocess.Popen[str]]:
    """Run Python, or another program; pipe both outputs, and kill the program at the end."""
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | outputs
    usual = os.environ | {"PYTHONUNBUFFERED": ""}  # or a flush that is missing would not show
    program = (sys.executable, "-W", "error") if python else ()
    with subprocess.Popen(
        [*program, *command], text=True, cwd=ROOT, env=usual, **outputs
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_with(process: subprocess.Popen[str], text: str) -> str:
    """Read the log of a process until a line has this text, and return it."""
    assert process.stderr
    lines = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return line.rstrip("\n")
    raise AssertionError(f"the log ended without {text!r}: {''.join(lines)}")


def url_of(process: subprocess.Popen[str]) -> str:
    """Read the log of a server until it names its URL."""
    return line_with(process, " serving ").split()[-1]
