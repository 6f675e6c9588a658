"""Both scripts as programs: their lines, options, signals and outputs, as a user meets them."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from subprocess import Popen
from typing import Any

from client import BetaBinomial, WebSocketClient
from tests import support
from tests.faults import request
from tests.scenarios import LONG, SEED, own_port, url_at
from tests.support import PATIENCE, ROOT, line_with, url_of

HERE = "--address", "127.0.0.1"
FAST = *HERE, "--port", "0", "--interval", "5"
needs_signals = unittest.skipIf(os.name == "nt", "Windows has no such signals")


@contextlib.contextmanager
def running(*command: str, **options: Any) -> Iterator[Popen[str]]:
    """Run a program, and kill it if it takes too long, or a read of its output would never end."""
    with support.running(*command, **options) as process:
        watch = threading.Timer(PATIENCE, process.kill)
        watch.start()
        try:
            yield process
        finally:
            watch.cancel()


def finished(*command: str) -> tuple[int, str, str]:
    """Run Python until it ends, and return its status and both outputs."""
    with running(*command) as process:
        out, err = process.communicate()
    return process.returncode, out, err


def end(process: Popen[str], number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
    """Send a signal, and return the status and what was written to both outputs by the end."""
    assert process.stdout and process.stderr
    process.send_signal(number)
    # communicate() would pass over what has been read ahead.
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(), out, err


def follow(process: Popen[str], trials: int) -> str:
    """Read the lines of client.py until one has counted so many tosses, and return it."""
    assert process.stdout
    shown = WebSocketClient("ws://localhost/")
    for line in process.stdout:
        alpha, beta, shown.missed = map(int, re.findall(r"\d+(?=[,)\n])", line))
        assert alpha + beta >= sum(shown.posterior), line
        shown.posterior = BetaBinomial(alpha, beta)
        assert line == f"{shown}\n", line
        if alpha + beta - 2 >= trials:
            return line
    raise AssertionError(f"the output ended before {trials} tosses")


def last_line(process: Popen[str]) -> str:
    """Wait until a client's server has ended, end the client, and return its last line."""
    line_with(process, "1001")
    return end(process)[1].splitlines()[-1]


@needs_signals
class PairTests(unittest.TestCase):
    """server.py and client.py in terminals beside each other."""

    def setUp(self) -> None:
        self.port = self.enterContext(own_port())
        self.server = self.start_server()
        self.client = self.start_client()

    def start_server(self) -> Popen[str]:
        options = *HERE, "--port", str(self.port), "--interval", "5"
        server = self.enterContext(running("server.py", *options))
        self.assertEqual(url_of(server), url_at(self.port))
        return server

    def start_client(self) -> Popen[str]:
        return self.enterContext(running("client.py", "--url", url_at(self.port)))

    def test_ctrl_c(self) -> None:
        """It ends a client with a last line, a server without one; the log says who has come."""
        line_with(self.server, " connected, 1 in all")
        follow(self.client, 10)
        status, out, log = end(self.client)
        self.assertEqual((status, out[-10:]), (0, " missed 0\n"))
        self.assertRegex(log, rf"\A\d\d:\d\d:\d\d connected to {url_at(self.port)}\n\Z")
        line_with(self.server, " closed, 0 left")
        self.assertEqual(end(self.server), (0, "", ""))

    def test_two_clients_agree_to_the_last_digit(self) -> None:
        """When the server ends, both have the same last line, though one has come later."""
        follow(self.client, 50)
        other = self.start_client()
        follow(other, 100)
        self.assertEqual(end(self.server)[0], 0)
        self.assertEqual(last_line(self.client), last_line(other))

    def test_frozen_client(self) -> None:
        """A client that was frozen for a while has the same last line as another."""
        follow(self.client, 50)
        self.client.send_signal(signal.SIGSTOP)
        other = self.start_client()
        if LONG:  # until a ping has timed out
            line_with(self.server, " closed, 1 left")
        follow(other, 300)
        self.client.send_signal(signal.SIGCONT)
        follow(self.client, 300)
        end(self.server)
        self.assertEqual(last_line(self.client), last_line(other))

    def test_restart(self) -> None:
        """After a restart, a client says how far it followed the last run, and counts on."""
        follow(self.client, 50)
        self.assertEqual(end(self.server, signal.SIGTERM)[0], 0)
        self.start_server()
        followed = int(line_with(self.client, " the last run was followed to ").split()[-1])
        self.assertGreaterEqual(followed, 50)
        self.assertIn(" missed 0\n", follow(self.client, followed + 10))

    def test_two_ctrl_c_end_a_client(self) -> None:
        """A second one ends it though the server does not answer its Close frame; no traceback."""
        clients = [self.start_client() for _ in range(6)]
        for process in clients:
            follow(process, 10)
        self.server.send_signal(signal.SIGSTOP)
        for pause, process in zip((0, 0.005, 0.01, 0.02, 0.04, 0.5), clients, strict=True):
            process.send_signal(signal.SIGINT)
            time.sleep(pause)  # the fault itself
            # What the second one interrupts may be Python's own end.
            self.assertNotRegex(end(process)[2], "client.py|tornado")

    def test_second_signal_ends_a_server(self) -> None:
        """A second signal ends it though a client does not answer the goodbye; no traceback."""
        with socket.create_connection(("127.0.0.1", self.port)) as peer:
            peer.sendall(request())
            line_with(self.server, " connected, 2 in all")
            self.server.send_signal(signal.SIGTERM)
            data = b""
            while b"going away" not in data:
                data += peer.recv(4096) or self.fail("no goodbye")
            status, _, log = end(self.server, signal.SIGTERM)
        self.assertEqual(status, 0)
        self.assertNotIn("Traceback", log)


@needs_signals
class ProgramTests(unittest.TestCase):
    """One of the scripts by itself; nobody listens where the client looks for a server."""

    def setUp(self) -> None:
        random.seed(SEED)
        self.port = self.enterContext(own_port())
        self.watch = "client.py", "--url", url_at(self.port)

    def test_client_first(self) -> None:
        """A client that is there first says so, waits, and follows the server that comes."""
        with running(*self.watch) as process:
            line_with(process, "cannot connect: ")
            with running("server.py", *HERE, "--port", str(self.port)):
                follow(process, 10)

    def test_ctrl_c_in_mid_wait(self) -> None:
        """Ctrl-C ends a client that waits for its next try; SIGTERM ends it as any program."""
        nothing = f"{WebSocketClient(url_at(self.port))}\n"
        for number, status in ((signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)):
            with self.subTest(number), running(*self.watch) as process:
                line_with(process, "cannot connect: ")
                ended, out, log = end(process, number)
                self.assertEqual((ended, {*out.splitlines(True)}), (status, {nothing}))
                self.assertNotIn("Traceback", log)

    def test_two_signals_in_quick_succession_end_a_server(self) -> None:
        """The second may come when Python has put the handlers away: then the status is its own."""
        for _ in range(100 if LONG else 8):
            first, second = random.choices((signal.SIGTERM, signal.SIGINT), k=2)
            with self.subTest(SEED=SEED), running("server.py", *FAST) as process:
                url_of(process)
                process.send_signal(first)
                time.sleep(random.uniform(0, 0.003))  # the fault itself
                status, _, log = end(process, second)
                self.assertIn(status, (0, -second))
                self.assertNotRegex(log, "server.py|tornado")

    def test_taken_port(self) -> None:
        """It ends a server with one line and status 1."""
        command = "-W", "ignore", "server.py", *HERE, "--port", str(self.port)  # Tornado has one
        with socket.create_server(("127.0.0.1", self.port)):
            *ended, log = finished(*command)
        self.assertEqual(ended, [1, ""])
        self.assertRegex(log, rf"\A[^\n]*127\.0\.0\.1:{self.port}: [^\n]+\n\Z")

    def test_handshake_that_fails(self) -> None:
        """It is one line of a client's log, without the traceback that Tornado has for it."""
        with (
            socket.create_server(("127.0.0.1", self.port)) as listener,
            running("-W", "ignore", *self.watch) as process,  # for the connection that stays open
        ):
            for _ in range(2):
                with listener.accept()[0] as peer:
                    peer.recv(4096)
                    peer.sendall(b"HTTP/1.1 101 Sure\r\n\r\n")
                self.assertIn(" cannot connect: ", line_with(process, ""))

    @unittest.skipUnless(sys.platform == "linux", "only on Linux is 127.0.0.2 always there")
    def test_default_address(self) -> None:
        """As it starts, a server listens on localhost, and on no other address."""
        with running("server.py", "--port", str(self.port)) as process:
            url_of(process)
            self.assertRaises(OSError, socket.create_connection, ("127.0.0.2", self.port))

    def test_eager_tasks(self) -> None:
        """What `run` runs creates tasks that begin at once, where Python has such: from 3.12 on."""
        code = """if True:
            import asyncio, server
            async def main():
                asyncio.create_task(step())
                print("after")
            async def step():
                print("step")
            server.run(main())"""
        output = "step\nafter\n" if sys.version_info >= (3, 12) else "after\nstep\n"
        self.assertEqual(finished("-c", code), (0, output, ""))

    def test_import(self) -> None:
        """Importing either script prints, parses and starts nothing."""
        code = "import server, client, threading; assert threading.active_count() == 1"
        self.assertEqual(finished("-c", code, "--not-an-option"), (0, "", ""))

    def test_alone_in_a_folder(self) -> None:
        """The two files need nothing else, and not each other."""
        here, there = (self.enterContext(tempfile.TemporaryDirectory()) for _ in range(2))
        with running(shutil.copy(ROOT / "server.py", here), *FAST) as process:
            script = shutil.copy(ROOT / "client.py", there)
            with running(script, "--url", url_of(process)) as follower:
                follow(follower, 10)

    def test_output_that_head_has_left(self) -> None:
        """A client ends quietly when nobody reads its output any more."""
        with running(*self.watch) as process:
            assert process.stdout and process.stderr
            process.stdout.readline()
            process.stdout.close()
            log = process.stderr.read()
            self.assertEqual(process.wait(), 0)
        self.assertEqual([line for line in log.splitlines() if "cannot connect: " not in line], [])

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_full_output(self) -> None:
        """A client whose output is full says so in one line, and ends with status 1."""
        with open("/dev/full", "w") as full, running(*self.watch, stdout=full) as process:
            *_, line = process.communicate()[1].splitlines()
        self.assertEqual(process.returncode, 1)
        self.assertIn("[Errno 28]", line)

    def test_closed_output(self) -> None:
        """Either script runs without a standard output, until Ctrl-C."""
        closed = "/bin/sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-W", "error"
        for script, line in ((self.watch, "cannot connect"), (("server.py", *FAST), "serving")):
            with self.subTest(script[0]), running(*closed, *script, python=False) as process:
                line_with(process, line)
                status, _, log = end(process)
                self.assertEqual(status, 0)
                self.assertNotIn("Traceback", log)

    def test_blocked_output(self) -> None:
        """A client whose output nobody reads goes on listening; SIGTERM ends it."""
        source, sink = os.pipe()
        self.addCleanup(os.close, source)
        self.addCleanup(os.close, sink)
        os.set_blocking(sink, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(sink, b"x")
        os.set_blocking(sink, True)  # as a terminal is; now it is full
        with running("server.py", *FAST) as process:
            url = url_of(process)
            with running("client.py", "--url", url, stdout=sink) as follower:
                line_with(follower, "connected to")
                end(process)
                line_with(follower, "1001")
                follower.terminate()
                self.assertEqual(follower.wait(), -signal.SIGTERM)


class OptionTests(unittest.TestCase):
    def refuses(self, script: str, *options: str) -> None:
        """See that each of the options ends a script with status 2, its usage and one line."""
        for option in options:
            with self.subTest(option=option):
                status, out, log = finished(script, option)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(log, rf"\Ausage: [^:]*\n{script}: error: [^\n]+\n\Z")
                self.assertNotIn("password", log)

    def test_bad_options_of_the_server(self) -> None:
        """A port, an address, a probability or an interval that cannot be meant is refused."""
        bad = ["--port=-1", "--port=65536", "--port=abc", "--address=", "--unknown", "--port"]
        bad += ["--p=-0.1", "--p=1.1", "--p=nan", "--interval=0", "--interval=-1", "--interval=inf"]
        self.refuses("server.py", *bad)

    def test_bad_options_of_the_client(self) -> None:
        """A URL that can never work is refused, and no password is shown."""
        bad = "--url=http://a/", "--url=", "--url=ws://user:password@a/", "--unknown", "--url"
        self.refuses("client.py", *bad)

    def test_help(self) -> None:
        """--help names every option and its default."""
        for script, texts in (
            ("server.py", ("--address", "localhost", "8765", "--p ", "0.72", "--interval", "100")),
            ("client.py", ("--url", "ws://localhost:8765/websocket")),
        ):
            status, out, log = finished(script, "--help")
            self.assertEqual((status, log), (0, ""))
            for text in texts:
                self.assertIn(text, out)
