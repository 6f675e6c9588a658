"""What several test modules share: fresh servers, scripts as subprocesses."""

import asyncio
import contextlib
import gc
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.testing import AsyncTestCase
from tornado.web import Application

from client import WebSocketClient
from server import WebSocketServer, make_app

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (sys.executable, "-W", "error")
HANDSHAKE = (
    b"GET /websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
TIMEOUT = 90  # seconds until a condition that never comes true fails a test; no measurement


def fresh_server(
    handler: type[WebSocketServer] = WebSocketServer, **attributes: Any
) -> type[WebSocketServer]:
    """Return a stream of its own, with clients of its own, such as a new process has.

    `serve` says goodbye to `WebSocketServer.clients` alone; give that set as `clients` to take part.
    """
    return type("FreshServer", (handler,), {"clients": set()} | attributes)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until the condition holds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come true")
        await asyncio.sleep(0.005)


def free_port() -> int:
    """Return a port that nobody listens on, for what cannot take a free one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    """Tell whether anybody listens on a port."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


class Recorder(WebSocketClient):
    """A client that keeps every sample, whatever it is, and counts the calls of on_message."""

    def __init__(self, url: str, retry_delay: float = 0.01) -> None:
        super().__init__(url, retry_delay)
        self.samples: list[Any] = []
        self.calls = 0

    def on_message(self, samples: list[Any]) -> None:
        self.calls += 1
        self.samples += samples


class Tracebacks(logging.Handler):
    """Keep the log silent, and find what a test may not leave behind: tracebacks and warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or (record.name == "asyncio" and record.levelno >= logging.ERROR):
            self.found.append(self.format(record))

    def unraisable(self, problem: "sys.UnraisableHookArgs") -> None:
        """Take a warning that has become an error where nobody can catch it, as in __del__."""
        # Tornado leaves what belongs to a handshake that failed to the garbage collector.
        left = ("<socket", "Unclosed WebSocketClientConnection")
        text = str(problem.exc_value)
        if isinstance(problem.exc_value, ResourceWarning) and any(name in text for name in left):
            return
        self.found.append(repr(problem.exc_value))


class PairCase(AsyncTestCase):
    """A test with a fresh server in its own event loop, and clients that it stops at the end."""

    attributes: ClassVar[dict[str, Any]] = {}  # of the server, such as history_size
    unread = False  # a connection whose messages nobody reads leaves a task for good

    def setUp(self) -> None:
        super().setUp()
        self.tracebacks = Tracebacks()
        logging.getLogger().addHandler(self.tracebacks)
        self.enterContext(mock.patch("sys.unraisablehook", self.tracebacks.unraisable))
        self.server = fresh_server(**self.attributes)
        self.following: list[asyncio.Task[None]] = []
        self.others: list[HTTPServer] = []
        self.listen()

    def listen(self, port: int = 0) -> None:
        """Serve on a free port, or on this one."""
        sockets = bind_sockets(port, "127.0.0.1")
        self.port = sockets[0].getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}/websocket"
        self.http_server = HTTPServer(make_app(self.server), idle_connection_timeout=10)
        self.http_server.add_sockets(sockets)

    async def close(self) -> None:
        """Stop listening, and close every client, as a server does that goes away."""
        self.http_server.stop()
        await self.http_server.close_all_connections()
        for handler in list(self.server.clients):
            handler.close(1001, "going away")
        await until(lambda: not self.server.clients)

    async def restart(self) -> None:
        """Come back on the same port as a new run of the stream."""
        await self.close()
        self.server = fresh_server(**self.attributes)
        self.listen(self.port)

    def follow(self, client: WebSocketClient) -> asyncio.Task[None]:
        """Run the client in this test's event loop."""
        task = asyncio.ensure_future(client.run())
        self.following.append(task)
        return task

    def serve(self, application: Application, **options: Any) -> str:
        """Serve another application, such as a server that misbehaves, and return its address."""
        sockets = bind_sockets(0, "127.0.0.1")
        server = HTTPServer(application, **options)
        server.add_sockets(sockets)
        self.others.append(server)
        return f"127.0.0.1:{sockets[0].getsockname()[1]}"

    def tearDown(self) -> None:
        async def end() -> None:
            for task in self.following:
                task.cancel()
            ends = await asyncio.gather(*self.following, return_exceptions=True)
            await self.close()
            for server in self.others:
                server.stop()
                await server.close_all_connections()
            # Or a handshake that is cut here has nobody to see its failure.
            await until(lambda: self.unread or len(asyncio.all_tasks()) == 1)
            for _ in range(3):  # turns of the event loop, in which Tornado passes the failure on
                await asyncio.sleep(0)
            self.assertLessEqual({*map(type, ends)}, {asyncio.CancelledError})

        self.io_loop.run_sync(end)
        super().tearDown()
        gc.collect()
        logging.getLogger().removeHandler(self.tracebacks)
        self.assertEqual(self.tracebacks.found, [])


@contextlib.contextmanager
def running(
    *arguments: str, program: Sequence[str] = PYTHON, **outputs: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run Python, such as a script with its options; pipe both outputs, and kill it at the end."""
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | outputs
    usual = os.environ | {"PYTHONUNBUFFERED": ""}  # or a flush that is missing would not show
    command = [*program, *arguments]
    with subprocess.Popen(command, text=True, cwd=ROOT, env=usual, **outputs) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    """Read the first line of a process's standard output: from server.py, the URL."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError("the process has ended")
    return line.rstrip("\n")
