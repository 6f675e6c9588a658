"""Both scripts as programs: their lines, options, signals and outputs, as a user meets them.

What happens inside them is left to test_server.py and test_client.py.
"""

import asyncio
import contextlib
import io
import os
import re
import signal
import socket
import sys
import time
import unittest
from subprocess import DEVNULL, Popen
from unittest import mock

from tornado.websocket import WebSocketProtocol13

import client
import server
from client import BetaBinomial, WebSocketClient
from tests.support import HANDSHAKE, PYTHON, accepts, first_line, free_port, running, until

FAST = ("--port", "0", "--address", "127.0.0.1", "--interval", "1")


def finished(*arguments: str) -> tuple[int, str, str]:
    """Run Python until it ends, and return its status and both outputs."""
    with running(*arguments, program=[sys.executable]) as process:
        out, err = process.communicate()
    return process.returncode, out, err


def stop(process: Popen[str], number: int = signal.SIGINT) -> tuple[int, str, str]:
    """Send a signal, and return the status and what was written to both outputs by the end."""
    assert process.stdout and process.stderr
    process.send_signal(number)
    # communicate() would pass over what readline() has buffered.
    out, err = process.stdout.read(), process.stderr.read()
    return process.wait(), out, err


def said(process: Popen[str], text: str) -> str:
    """Read the log until a line has this text, and return it."""
    assert process.stderr
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError("the log ended")


class ScriptCase(unittest.TestCase):
    def setUp(self) -> None:
        # Nobody listens here, until a test does.
        self.port = free_port()
        self.url = f"ws://127.0.0.1:{self.port}/websocket"

    def follow(self, process: Popen[str], enough: int) -> str:
        """Read lines, whose counts never go down, until one has enough trials, and return it."""
        assert process.stdout
        shown, trials = WebSocketClient(self.url), 0
        for line in process.stdout:
            match = re.search(r" Beta\((\d+), (\d+)\) .* missed (\d+)$", line)
            assert match, line
            alpha, beta, shown.missed = map(int, match.groups())
            shown.posterior = BetaBinomial(alpha, beta)
            self.assertEqual(line, f"{shown}\n")
            self.assertGreaterEqual(alpha + beta - 2, trials)
            if (trials := alpha + beta - 2) >= enough:
                return str(shown)
        raise AssertionError("the output ended")


class PairTests(ScriptCase):
    def test_two_clients_agree_to_the_last_digit(self) -> None:
        """They follow the URL that server.py prints; Ctrl-C ends all three with status 0."""
        with running("server.py", *FAST) as process:
            url = first_line(process)
            self.assertRegex(url, r"^ws://127\.0\.0\.1:\d+/websocket$")
            with (
                running("client.py", "--url", url) as first,
                running("client.py", "--url", url) as second,
            ):
                seen, lines = [self.follow(first, 50), self.follow(second, 100)], []
                status, out, err = stop(process)
                self.assertEqual((status, out), (0, ""))
                self.assertRegex(
                    err, r"^(\S+ client \S+ (connected, \d in all|closed, \d left)\n){4}$"
                )
                for one, line in zip((first, second), seen, strict=True):
                    self.assertRegex(said(one, ""), rf"^\d\d:\d\d:\d\d connected to {url}\n$")
                    self.assertIn(" closed by the server: 1001 'going away'; ", said(one, ""))
                    status, out, _ = stop(one)
                    self.assertEqual(status, 0)
                    lines.append([line, *out.splitlines()][-1])
        self.assertEqual(lines[0], lines[1])

    def test_client_first_and_a_restart(self) -> None:
        """A client that is there first waits; after a restart it says so, and keeps its counts."""
        # Slow enough for the history to hold the new run until the client is back.
        options = *FAST, "--port", str(self.port), "--interval", "10", "--p", "1", "--batch", "2"
        with running("client.py", "--url", self.url) as one:
            said(one, "cannot connect: [Errno")
            with running("server.py", *options) as process:
                self.assertEqual(first_line(process), self.url)
                self.follow(one, 50)
                self.assertEqual(stop(process, signal.SIGTERM)[:2], (0, ""))
            said(one, "closed by the server: 1001 'going away'; next try in ")
            with running("server.py", *options):
                line = said(one, "the server began anew")
                followed = re.search(r"; its last run was followed to (\d+)$", line)
                assert followed
                self.assertGreaterEqual(int(followed[1]), 50)
                last = self.follow(one, int(followed[1]) + 50)
                self.assertRegex(last, r" Beta\(\d*[13579], 1\) .* missed 0$")

    def test_a_client_that_stops_itself_ends_by_itself(self) -> None:
        """watch shows whatever str(client) is, and returns once on_message has called stop."""
        code = """if True:
            import sys, client
            class Mine(client.WebSocketClient):
                seen = 0
                def on_message(self, samples):
                    self.seen += len(samples)
                    self.stop()
                def __str__(self):
                    return "some" if self.seen else "none"
            client.main(Mine)"""
        with running("server.py", *FAST) as process:
            status, out, err = finished("-W", "error", "-c", code, "--url", first_line(process))
        self.assertEqual(status, 0)
        self.assertRegex(out, "^(none\n)*(some\n)+$")
        self.assertRegex(err, "^.* connected to .*\n$")


class SignalTests(ScriptCase):
    def test_a_second_signal_ends_the_servers_goodbye(self) -> None:
        """While a client does not answer the close, a second signal ends the server quietly."""
        with running("server.py", *FAST) as process:
            port = int(first_line(process).split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port)) as peer, peer.makefile("rb") as got:
                peer.sendall(HANDSHAKE)
                said(process, " connected, 1 in all")
                process.send_signal(signal.SIGTERM)
                frames, goodbye = b"", b"\x88\x0c\x03\xe9going away"  # the Close frame, 1001
                while not frames.endswith(goodbye):
                    frames += got.read(1) or self.fail("the connection ended")
                status, out, err = stop(process, signal.SIGTERM)
            self.assertEqual((status, out), (0, ""))
            self.assertRegex(err, r"^(\S+ client \S+ closed, 0 left\n)?$")

    def test_two_signals_in_a_row_end_a_client_without_a_traceback(self) -> None:
        """A second Ctrl-C, however soon after the first, gives no traceback of client.py or Tornado."""
        with running("server.py", *FAST) as process:
            url = first_line(process)
            for pause in (0, 0.005, 0.01, 0.02, 0.04):
                with self.subTest(pause=pause), running("client.py", "--url", url) as one:
                    self.follow(one, 10)
                    one.send_signal(signal.SIGINT)
                    time.sleep(pause)  # the fault itself
                    # Python's own end may be what is interrupted, and is no fault of the client.
                    self.assertNotRegex(stop(one)[2], "client.py|tornado")

    def test_client_ends_whatever_its_peer_does(self) -> None:
        """Each answer costs at most one line, and Ctrl-C ends the client, a second one its close."""
        accepted = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
        accepted += b"Connection: Upgrade\r\nSec-WebSocket-Accept: KEY\r\n\r\n"
        failed = r"^\S+ cannot connect: .*; next try in \d\.\d s\n$"
        for reply, line in (
            (b"", ""),  # it ends in mid-handshake
            (b"garbage\r\n\r\n", failed),
            (b"HTTP/1.1 101 Sure\r\n\r\n", failed),
            (accepted, r"^\S+ connected to \S+\n$"),
        ):
            with self.subTest(reply=reply), socket.create_server(("127.0.0.1", 0)) as listener:
                url = f"ws://127.0.0.1:{listener.getsockname()[1]}/"
                # Tornado forgets to close the connection of a 101 that it does not accept,
                # which only "-W error" would say.
                with running("client.py", "--url", url, program=[sys.executable]) as process:
                    peer, _ = listener.accept()
                    with peer, peer.makefile("rb") as request:
                        head = b"".join(iter(request.readline, b"\r\n"))
                        key = head.partition(b"Sec-Websocket-Key: ")[2].split()[0]
                        answer = WebSocketProtocol13.compute_accept_value(key).encode()
                        peer.sendall(reply.replace(b"KEY", answer))
                        if line:
                            self.assertRegex(said(process, ""), line)
                        if reply == accepted:
                            process.send_signal(signal.SIGINT)
                            self.assertEqual(request.read(1), b"\x88")  # its Close frame
                        status, _, err = stop(process)
                        self.assertEqual((status, err), (0, ""))

    def test_a_signal_after_the_end_is_passed_over(self) -> None:
        """The handlers of run stay, and have nothing to end any more."""
        code = "import asyncio, os, server; server.run(asyncio.sleep(0)); os.kill(os.getpid(), 15)"
        self.assertEqual(finished("-c", code), (0, "", ""))


class OptionTests(ScriptCase):
    def test_what_cannot_be_done_is_one_line(self) -> None:
        """A bad option costs one line on standard error and status 2, a port in use status 1."""
        bad = [f"--port={port}" for port in ("-1", "abc", "65536", "1.5")]
        bad += [f"--p={p}" for p in ("-0.1", "1.1", "nan", "x")]
        bad += [f"--interval={interval}" for interval in ("0", "-1", "nan", "inf", "0.5")]
        bad += [f"--batch={batch}" for batch in ("0", "-1", "x")]
        bad += [f"--url={url}" for url in ("http://a/", "a", "", "ws://a:99999", "ws://u:pw@a/")]
        bad += ["--url"]
        started = AssertionError("started")
        self.enterContext(mock.patch.object(WebSocketClient, "start", side_effect=started))
        # A server that took a bad option would end here, too, but with status 1.
        busy = "server.py", "--address=127.0.0.1", f"--port={self.port}"
        self.enterContext(socket.create_server(("127.0.0.1", self.port)))
        for option in bad:
            argv = ["client.py", option] if "--url" in option else [*busy, option]
            with (
                self.subTest(argv=argv),
                mock.patch("sys.argv", argv),
                contextlib.redirect_stderr(io.StringIO()) as err,
            ):
                with self.assertRaises(SystemExit) as end:
                    if argv[0] == "client.py":
                        client.main()
                    else:
                        asyncio.run(server.main())
                self.assertEqual(end.exception.code, 2)
                self.assertRegex(err.getvalue(), rf"^{argv[0]}: error: .*\n$")
                self.assertNotIn("pw", err.getvalue())
        for arguments, status, text in (
            (["server.py", "--address="], 2, "server.py: error: .* empty"),
            (["client.py", "--unknown"], 2, "client.py: error: .*--unknown"),
            (busy, 1, f"cannot serve on 127.0.0.1:{self.port}: "),
        ):
            *got, line = finished(*arguments)
            self.assertEqual(got, [status, ""])
            self.assertRegex(line, rf"{text}.*\n$")
            self.assertNotIn("Traceback", line)

    def test_help_names_every_option_with_its_default(self) -> None:
        """--help says what the script does, and each option's default."""
        for module, defaults in (
            (server, ("(localhost)\n", "(8765)\n", "(0.72)\n", "(100)\n", "(1)\n")),
            (client, ("ws://localhost:8765/websocket\n",)),
        ):
            status, out, err = finished(f"{module.__name__}.py", "--help")
            self.assertEqual((status, err), (0, ""))
            for text in defaults:
                self.assertIn(text, out)
            self.assertIn(" ".join((module.__doc__ or "none").split()), " ".join(out.split()))

    def test_importing_does_nothing(self) -> None:
        """Importing either script prints, parses and starts nothing."""
        code = "import server, client, threading; assert threading.active_count() == 1"
        self.assertEqual(finished("-c", code, "--not-an-option"), (0, "", ""))


class OutputTests(ScriptCase):
    def test_ctrl_c_shows_the_last_line(self) -> None:
        """Without block characters there are the numbers; SIGTERM ends it as any program."""
        picture, numbers = "▕████████████████████▏ ", "Beta(1, 1)  mean 0.5000  sd 0.2887  missed 0"
        for encoding, line, number, expected in (
            ("utf-8", picture + numbers, signal.SIGINT, 0),
            ("ascii", numbers, signal.SIGINT, 0),
            ("utf-8", picture + numbers, signal.SIGTERM, -signal.SIGTERM),
        ):
            with (
                self.subTest(encoding=encoding, number=number),
                mock.patch.dict(os.environ, {"PYTHONIOENCODING": encoding}),
                running("client.py", "--url", self.url) as process,
            ):
                said(process, "cannot connect")
                first = first_line(process)  # which is there at once
                status, out, err = stop(process, number)
                self.assertEqual((status, {first, *out.splitlines()}), (expected, {line}))
                self.assertNotIn("Traceback", err)

    def test_an_output_that_takes_nothing(self) -> None:
        """One that is closed, or that head has left, costs no line; a full one costs one line."""
        watch = "client.py", "--url", self.url
        serve = "server.py", "--address", "127.0.0.1", "--port", str(self.port)
        place = f"127.0.0.1:{self.port}"
        closed, head = 'exec "$@" >&-', '("$@"; echo status $? >&2) | head -n 1'
        cases = [(watch, closed, "", 0), (serve, closed, "", 0), (watch, head, "status 0\n", 0)]
        if os.path.exists("/dev/full"):
            full = 'exec "$@" >/dev/full'
            for script, what in (watch, "standard output"), (serve, f"cannot serve on {place}"):
                cases.append((script, full, f"{what}: [Errno 28] No space left on device\n", 1))
        for arguments, command, line, status in cases:
            shell = "/bin/sh", "-c", command, "sh", *PYTHON
            with (
                self.subTest(command=command, arguments=arguments),
                running(*arguments, program=shell, stdout=DEVNULL) as process,
            ):
                if command == closed:
                    if arguments == watch:
                        said(process, "cannot connect")
                    else:
                        asyncio.run(until(lambda: accepts(self.port)))
                    process.send_signal(signal.SIGINT)
                lines = re.sub(".* cannot connect: .Errno .*\n", "", process.communicate()[1])
                self.assertEqual((lines, process.returncode), (line, status))
