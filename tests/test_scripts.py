"""Both scripts as programs: their lines, options, signals and outputs, as a user meets them."""

import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
import unittest
from subprocess import Popen

from client import WebSocketClient
from tests.programs import line_with, running, url_of
from tests.support import LONG, PATIENCE, ROOT, SEED, own_port, url_at

SERVER = "server.py", "--address", "127.0.0.1", "--interval", "5", "--port"  # a port follows
needs_signals = unittest.skipIf(os.name == "nt", "Windows has no such signals")


def finished(*command: str) -> tuple[int, str, str]:
    """Run Python until it ends, and return its status and both outputs."""
    with running(*command) as process:
        out, log = process.communicate()
    return process.returncode, out, log


def end(process: Popen[str], number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
    """Send a signal, and return the status and what was written to both outputs by the end."""
    assert process.stdout and process.stderr
    process.send_signal(number)
    # communicate() would pass over what has been read ahead.
    out, log = process.stdout.read(), process.stderr.read()
    return process.wait(), out, log


def freeze(process: Popen[str]) -> None:
    """Stop a process with SIGSTOP, and wait until the last of its threads has stopped."""
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)


def follow(process: Popen[str], trials: int) -> None:
    """Read the lines of client.py until one has counted so many tosses; none may be missed."""
    assert process.stdout
    for line in process.stdout:
        assert line.endswith("  missed 0\n"), line
        alpha, beta = re.findall(r"\d+(?=[,)])", line)
        if int(alpha) + int(beta) - 2 >= trials:
            return
    raise AssertionError(f"the output ended before {trials} tosses")


@needs_signals
class PairTests(unittest.TestCase):
    """server.py and client.py in terminals beside each other."""

    def setUp(self) -> None:
        self.port = self.enterContext(own_port())
        self.server = self.enterContext(running(*SERVER, str(self.port)))
        first_line = line_with(self.server, "")
        self.assertRegex(first_line, rf"\A\d\d:\d\d:\d\d serving {url_at(self.port)}\Z")
        self.client = self.start_client()

    def start_client(self) -> Popen[str]:
        return self.enterContext(running("client.py", "--url", url_at(self.port)))

    def test_ctrl_c(self) -> None:
        """It ends a client with a last line, a server without one; the log says who has come."""
        line_with(self.server, " connected, 1 in all")
        follow(self.client, 10)
        status, out, log = end(self.client)
        self.assertEqual(status, 0)
        self.assertRegex(out, r"\A(▕.{20}▏ Beta\(\d+, \d+\)  mean .*  sd .*  missed 0\n)+\Z")
        self.assertRegex(log, rf"\A\d\d:\d\d:\d\d connected to {url_at(self.port)}\n\Z")
        line_with(self.server, " closed, 0 left")
        self.assertEqual(end(self.server), (0, "", ""))

    def test_two_clients_agree_to_the_last_digit(self) -> None:
        """Both have the same last line, though one has come later, and the other was frozen."""
        trials = 6_000 if LONG else 300  # after 30 s, a ping has timed out
        follow(self.client, 50)
        freeze(self.client)
        other = self.start_client()
        follow(other, trials)
        self.client.send_signal(signal.SIGCONT)
        follow(self.client, trials)
        self.assertEqual(end(self.server)[0], 0)
        last_lines = set()
        for client in self.client, other:
            line_with(client, "1001")
            last_lines.add(end(client)[1].splitlines()[-1])
        self.assertEqual(len(last_lines), 1, last_lines)

    def test_two_ctrl_c_end_a_client(self) -> None:
        """A second one ends it though the server does not answer its Close frame; no traceback."""
        pauses = 0, 0.005, 0.01, 0.02, 0.04, 0.5
        clients = [self.start_client() for _ in pauses]
        for client in clients:
            follow(client, 10)
        freeze(self.server)
        for client, pause in zip(clients, pauses, strict=True):
            client.send_signal(signal.SIGINT)
            time.sleep(pause)  # the fault itself
            # It may interrupt the end of Python itself, whose traceback is not ours.
            self.assertNotRegex(end(client)[2], "client.py|tornado")

    def test_second_signal_ends_a_server(self) -> None:
        """A second one ends it though a client does not answer the goodbye; no traceback."""
        other = self.start_client()
        line_with(self.server, " connected, 2 in all")
        freeze(self.client)
        self.server.send_signal(signal.SIGTERM)
        line_with(other, "1001")
        status, _, log = end(self.server, signal.SIGTERM)
        self.assertEqual(status, 0)
        self.assertNotIn("Traceback", log)

    def test_taken_port(self) -> None:
        """It ends a second server with one line and status 1."""
        # Tornado leaves a socket open, of which -W error would tell.
        *ended, log = finished("-W", "ignore", *SERVER, str(self.port))
        self.assertEqual(ended, [1, ""])
        self.assertRegex(log, rf"\A[^\n]*127\.0\.0\.1:{self.port}: [^\n]+\n\Z")

    def test_blocked_output(self) -> None:
        """A client whose output nobody reads goes on listening in its thread; SIGTERM ends it."""
        code = """if True:
            import client
            client.WebSocketClient.__str__ = lambda self: 1_000_000 * "x"  # more than a pipe takes
            client.main()"""
        with running("-c", code, "--url", url_at(self.port)) as blocked:
            line_with(blocked, " connected to ")
            end(self.server)
            line_with(blocked, "1001")
            self.assertEqual(end(blocked, signal.SIGTERM)[0], -signal.SIGTERM)


@needs_signals
class ProgramTests(unittest.TestCase):
    """One of the scripts by itself; nobody listens where the client looks for a server."""

    def setUp(self) -> None:
        self.port = self.enterContext(own_port())
        self.watch = "client.py", "--url", url_at(self.port)

    def test_ctrl_c_in_mid_wait(self) -> None:
        """It ends a client that waits for its next try, and prints a line a second."""
        with running(*self.watch) as process:
            line_with(process, " cannot connect: ")
            status, out, log = end(process)
        self.assertEqual(status, 0)
        self.assertEqual(set(out.splitlines()), {str(WebSocketClient(url_at(self.port)))})
        self.assertLess(out.count("\n"), 100)  # not as many as it can
        self.assertNotIn("Traceback", log)

    def test_two_signals_in_quick_succession_end_a_server(self) -> None:
        """The second may come when Python has put the handlers away: then it kills the server."""
        random.seed(SEED)
        for _ in range(100 if LONG else 8):
            first, second = random.choices((signal.SIGTERM, signal.SIGINT), k=2)
            with self.subTest(SEED=SEED), running(*SERVER, "0") as process:
                url_of(process)
                process.send_signal(first)
                time.sleep(random.uniform(0, 0.003))  # the fault itself
                status, _, log = end(process, second)
                if status != -second:  # if it was killed, Python may print a traceback of its own
                    self.assertEqual(status, 0)
                    self.assertNotRegex(log, "server.py|tornado")

    def test_handshake_that_fails(self) -> None:
        """It is one line of a client's log, without the traceback that Tornado has for it."""
        with socket.create_server(("127.0.0.1", self.port)) as listener:
            listener.settimeout(PATIENCE)
            # Tornado leaves the connection open, of which -W error would tell.
            with running("-W", "ignore", *self.watch) as process, listener.accept()[0] as peer:
                peer.recv(4096)
                peer.sendall(b"HTTP/1.1 101 Sure\r\n\r\n")
                first_line = line_with(process, "")
                self.assertIn(" cannot connect: ", first_line)
                self.assertEqual(end(process)[2], "")

    @unittest.skipUnless(sys.platform == "linux", "only on Linux is 127.0.0.2 always there")
    def test_default_address(self) -> None:
        """As it starts, a server listens on localhost, and on no other address."""
        with running("server.py", "--port", str(self.port)) as process:
            url_of(process)
            self.assertRaises(OSError, socket.create_connection, ("127.0.0.2", self.port))

    def test_eager_tasks(self) -> None:
        """Under `run`, a task begins at once, where Python can do that: from 3.12 on."""
        code = """if True:
            import asyncio, server
            async def nothing(): pass
            async def main(): print(asyncio.create_task(nothing()).done())
            server.run(main())"""
        self.assertEqual(finished("-c", code), (0, f"{sys.version_info >= (3, 12)}\n", ""))

    def test_output_that_head_has_left(self) -> None:
        """A client ends quietly when nobody reads its output any more."""
        with running(*self.watch) as process:
            assert process.stdout and process.stderr
            process.stdout.readline()
            process.stdout.close()
            self.assertRegex(process.stderr.read(), r"\A(.* cannot connect: .*\n)*\Z")
            self.assertEqual(process.wait(), 0)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_full_output(self) -> None:
        """A client whose output is full says so in one line, and ends with status 1."""
        with open("/dev/full", "w") as full, running(*self.watch, stdout=full) as process:
            *_, line = process.communicate()[1].splitlines()
        self.assertEqual(process.returncode, 1)
        self.assertIn("[Errno 28]", line)


class OptionTests(unittest.TestCase):
    def test_bad_options(self) -> None:
        """Each ends a script with status 2, its usage and one line, which shows no password."""
        server = "--port=-1", "--port=abc", "--address=", "--p=1.1", "--interval=0", "--unknown"
        client = "--url=http://a/", "--url=ws://user:password@a/"
        commands = [("server.py", option) for option in server]
        commands += [("client.py", option) for option in client]
        for script, option in commands:
            with self.subTest(option):
                status, out, log = finished(script, option)
                self.assertEqual((status, out), (2, ""))
                self.assertRegex(log, rf"\Ausage: [^:]*\n{script}: error: [^\n]+\n\Z")
                self.assertNotIn("password", log)

    def test_help(self) -> None:
        """Alone in a folder, each script answers --help with its options and their defaults."""
        for script, texts in (
            ("server.py", ("--address", "localhost", "8765", "--p", "0.72", "--interval", "100")),
            ("client.py", ("--url", "ws://localhost:8765/websocket")),
        ):
            folder = self.enterContext(tempfile.TemporaryDirectory())
            status, out, log = finished(shutil.copy(ROOT / script, folder), "--help")
            self.assertEqual((status, log), (0, ""))
            for text in texts:
                self.assertRegex(out, rf"(?<!\w){re.escape(text)}(?!\w)")
