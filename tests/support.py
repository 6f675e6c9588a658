"""What several test modules share: streams that are served, and clients that keep all samples."""

import asyncio
import contextlib
import gc
import importlib.util
import json
import logging
import os
import secrets
import selectors
import shutil
import socket
import sys
import time
import unittest
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from tornado.web import Application

from client import WebSocketClient
from server import WebSocketServer, make_app, serve

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 90  # seconds until a condition that does not come true fails a test; no speed limit
SEED = int(os.environ.get("SEED") or secrets.randbelow(1_000_000))  # of random numbers
LONG = os.environ.get("LONG_TESTS") == "1"
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
            raise AssertionError(f"the condition stayed false: {seen}")
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def own_port() -> Iterator[int]:
    """Yield a port that no other program is given meanwhile, but a server of the test can take."""
    with socket.socket() as holder:  # on Linux, who asks for it may bind it, too
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = int(holder.getsockname()[1])
        if sys.platform != "linux":  # elsewhere, no server could bind while the holder does
            holder.close()
        yield port


def url_at(port: int) -> str:
    """Return the URL of a server on this machine."""
    return f"ws://127.0.0.1:{port}/websocket"


def fast_runner(factor: int) -> asyncio.Runner:
    """Make a runner whose clock runs so many times as fast, and which waits as much less."""
    selector = selectors.SelectSelector()
    loop = asyncio.SelectorEventLoop(selector)
    select, now = selector.select, loop.time
    # None means to wait for ever, and 0 not at all.
    selector.select = lambda timeout=None: select(timeout and timeout / factor)  # type: ignore
    loop.time = lambda: factor * now()  # type: ignore[method-assign]
    return asyncio.Runner(loop_factory=lambda: loop)


def which(program: str) -> str | None:
    """Find a program, also where Debian has daemons."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def needs(*names: str) -> Callable[[Any], Any]:
    """Skip tests where one of these is neither a module nor a program."""
    missing = [name for name in names if not (importlib.util.find_spec(name) or which(name))]
    return unittest.skipIf(missing, f"needs {', '.join(missing)}: see tests/requirements.txt")


def message(offset: object, samples: object, epoch: object = "a") -> str:
    """Return a message of the protocol, or what only looks like one."""
    return json.dumps({"epoch": epoch, "offset": offset, "samples": samples})


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

    def unraisable(self, problem: Any) -> None:
        """Take what is raised where nobody can catch it: in __del__, or at the end of a thread."""
        # Tornado leaves the socket of a handshake that was broken off to the garbage collector.
        left = ("<socket", "Unclosed WebSocketClientConnection")
        text = str(problem.exc_value)
        if isinstance(problem.exc_value, ResourceWarning) and any(name in text for name in left):
            return
        if problem.exc_type is not SystemExit:  # which just ends a thread
            self.found.append(repr(problem.exc_value))


class QuietCase(unittest.IsolatedAsyncioTestCase):
    """A test in an event loop of its own that leaves no traceback and no warning."""

    def setUp(self) -> None:
        self.left_behind = LeftBehind()
        logging.getLogger().addHandler(self.left_behind)
        for hook in "sys.unraisablehook", "threading.excepthook":
            self.enterContext(mock.patch(hook, self.left_behind.unraisable))
        self.addCleanup(self.check)  # while the hook is there, and after the cleanups of the test
        for name, level in (("server", logging.INFO), ("tornado.access", logging.CRITICAL)):
            logger = logging.getLogger(name)
            self.addCleanup(logger.setLevel, logger.level)
            logger.setLevel(level)

    def check(self) -> None:
        gc.collect()
        logging.getLogger().removeHandler(self.left_behind)
        clients = list(WebSocketServer.clients)
        WebSocketServer.clients.clear()  # or every later test would fail, too
        self.assertEqual((self.left_behind.found, clients), ([], []))


class ServedCase(QuietCase):
    """A test with a stream of its own, which is served at `self.url`."""

    make_app = staticmethod(make_app)  # a recipe may have another

    async def asyncSetUp(self) -> None:
        self.handler = new_handler()
        await self.begin()

    async def begin(self, port: int = 0) -> None:
        """Serve a new run of the stream."""
        app = self.make_app(self.handler)
        self.stream = self.handler.stream
        self.served = contextlib.AsyncExitStack()
        self.addAsyncCleanup(self.served.aclose)
        self.url = await self.served.enter_async_context(serving(app, port))
        self.port = urlsplit(self.url).port or 0

    async def restart(self, handler: type[WebSocketServer] | None = None) -> None:
        """End this run of the stream, and begin a new one at the same port, perhaps of a subclass."""
        await self.served.aclose()
        self.handler = handler or self.handler
        await self.begin(self.port)
