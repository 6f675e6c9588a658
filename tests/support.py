"""What several test modules share: fresh servers, scripts as subprocesses, blocks of the README."""

import asyncio
import contextlib
import logging
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from tornado.httpserver import HTTPServer
from tornado.testing import AsyncTestCase, bind_unused_port

from client import WebSocketClient
from server import WebSocketServer, make_app

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 30  # seconds until a condition that never comes true fails a test; no measurement


def fresh_server(**attributes: Any) -> type[WebSocketServer]:
    """Return a WebSocketServer with a log and clients of its own, such as a new process has."""
    log = {"clients": set(), "history": [], "end": 0, "epoch": secrets.token_hex(4)}
    return type("FreshServer", (WebSocketServer,), log | attributes)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until the condition holds."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the condition did not come true")
        await asyncio.sleep(0.005)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait, outside any event loop, until the condition holds."""
    asyncio.run(until(condition))


class PairCase(AsyncTestCase):
    """A test with a fresh server in its own event loop, and clients that it stops at the end."""

    attributes: ClassVar[dict[str, Any]] = {}  # of the server, such as history_size

    def setUp(self) -> None:
        super().setUp()
        logging.disable(logging.WARNING)  # tests of log lines enable them again
        self.server = fresh_server(**self.attributes)
        self.listen()
        self.following: list[asyncio.Task[None]] = []

    def listen(self, port: int | None = None) -> None:
        """Serve on a port that was free, or, after a restart, on the same one as before."""
        socket, self.port = bind_unused_port()
        self.http_server = HTTPServer(make_app(self.server), idle_connection_timeout=10)
        self.http_server.add_socket(socket)
        self.url = f"ws://127.0.0.1:{self.port}/websocket"

    def follow(self, client: WebSocketClient) -> asyncio.Task[None]:
        """Run the client in this test's event loop."""
        task = asyncio.ensure_future(client.run())
        self.following.append(task)
        return task

    def tearDown(self) -> None:
        async def end() -> None:
            for task in self.following:
                task.cancel()
            await asyncio.gather(*self.following, return_exceptions=True)
            self.http_server.stop()
            await self.http_server.close_all_connections()
            for handler in list(self.server.clients):
                handler.close()
            await until(lambda: not self.server.clients)

        self.io_loop.run_sync(end)
        logging.disable(logging.NOTSET)
        super().tearDown()


@contextlib.contextmanager
def running(script: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run server.py or client.py as a user would, with pipes for both outputs; kill it at the end."""
    command = [sys.executable, "-X", "dev", "-W", "error", str(ROOT / script), *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    """Read the first line of a process's standard output: from server.py, the URL."""
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def readme_blocks(heading: str, language: str) -> list[str]:
    """Return the fenced blocks in this language between a heading of README.md and the next."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    parts = re.split(r"^##+ (.+)$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return re.findall(rf"^```{language}\n(.*?)^```$", sections[heading], re.MULTILINE | re.DOTALL)
