"""Both scripts do in a terminal and in a pipe what their users expect."""

import contextlib
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor

from client import BetaBinomial
from tests.support import ROOT, TIMEOUT, first_line, free_port, running, wait_until

LINE = re.compile(
    r"Beta\((?P<alpha>\d+), (?P<beta>\d+)\)  mean (?P<mean>[01]\.\d{4})  sd (?P<sd>0\.\d{4})"
    r"  trials (?P<trials>\d+)  missed (?P<missed>\d+)"
)
FAST = ("--port", "0", "--address", "127.0.0.1", "--interval", "1")


def stop(process: subprocess.Popen[str], number: int = signal.SIGTERM) -> tuple[str, str]:
    """Send a signal, and return what the process has written to both outputs by its end."""
    assert process.stdout is not None
    assert process.stderr is not None
    process.send_signal(number)
    # communicate() would pass over what readline() has buffered.
    out, err = process.stdout.read(), process.stderr.read()
    process.wait()
    return out, err


class ScriptCase(unittest.TestCase):
    def follow(self, client: subprocess.Popen[str], enough: int) -> str:
        """Read lines until one says enough trials, and return it."""
        assert client.stdout is not None
        for line in client.stdout:
            match = LINE.fullmatch(line.rstrip("\n"))
            self.assertIsNotNone(match, line)
            if match and int(match["trials"]) >= enough:
                return line.rstrip("\n")
        raise AssertionError("the output ended")


class PairTests(ScriptCase):
    def test_server_first(self) -> None:
        """The first line of server.py is the URL with which client.py follows the stream."""
        with running("server.py", *FAST) as server:
            url = first_line(server)
            self.assertRegex(url, r"^ws://127\.0\.0\.1:\d+/websocket$")
            with running("client.py", "--url", url) as client:
                line = self.follow(client, 100)
                out, err = stop(client)
                self.assertEqual(client.returncode, 0)
            self.assertRegex(err, r"^\d\d:\d\d:\d\d connected to ws://\S+\n$")
            match = LINE.fullmatch([line, *out.splitlines()][-1])
            assert match is not None
            posterior = BetaBinomial(int(match["alpha"]) - 1, int(match["trials"]))
            self.assertEqual(int(match["beta"]), posterior.beta)
            self.assertEqual(match["mean"], f"{posterior.mean:.4f}")
            self.assertEqual(match["sd"], f"{posterior.sd:.4f}")
            out, err = stop(server)
            self.assertEqual((server.returncode, out), (0, ""))
            self.assertEqual(len(err.splitlines()), 2)  # the client came, and went

    def test_client_first_and_a_restart(self) -> None:
        """A client that is there first waits; after a restart it keeps its counts and goes on."""
        port = str(free_port())
        with running("client.py", "--url", f"ws://127.0.0.1:{port}/websocket") as client:
            assert client.stderr is not None
            self.assertIn("cannot connect: [Errno", client.stderr.readline())
            trials = 0
            for _ in range(2):
                # Slow enough for the history to hold the new run until the client is back.
                with running("server.py", *FAST, "--port", port, "--interval", "10") as server:
                    self.assertIn(port, first_line(server))
                    assert server.stderr is not None
                    self.assertIn(" connected, 1 in all", server.stderr.readline())
                    trials += 50
                    match = LINE.fullmatch(self.follow(client, trials))
                    assert match is not None
                    trials = int(match["trials"])
                    stop(server)
            _, err = stop(client)
            self.assertEqual(client.returncode, 0)
        self.assertIn("closed by the server: 1001 'going away'; next try in ", err)
        self.assertNotIn("missed", err)

    def test_two_clients_agree_to_the_last_digit(self) -> None:
        """After the server has gone, both clients' last lines are the same."""
        with running("server.py", *FAST) as server:
            url = first_line(server)
            with (
                running("client.py", "--url", url) as first,
                running("client.py", "--url", url) as second,
            ):
                lines = [self.follow(first, 50), self.follow(second, 100)]
                stop(server)
                for client in (first, second):
                    assert client.stderr is not None
                    while "closed by the server: 1001" not in (said := client.stderr.readline()):
                        self.assertTrue(said, "the client has ended")
                for client, line in zip((first, second), lines[:2], strict=True):
                    last = [line, *stop(client)[0].splitlines()][-1]
                    lines.append(last)
                self.assertEqual(lines[2], lines[3])

    def test_p_is_what_the_stream_shows(self) -> None:
        """With --p 1 every sample is a 1, --batch of them per message."""
        with running("server.py", *FAST, "--p", "1", "--batch", "10") as server:
            with running("client.py", "--url", first_line(server)) as client:
                line = self.follow(client, 100)
            self.assertRegex(line, r"^Beta\(\d+1, 1\)  mean .*  trials \d+0  missed 0$")


class GarbageTests(ScriptCase):
    def test_a_bad_handshake_is_one_line(self) -> None:
        """A port that answers garbage, or a 101 that is wrong: one line a try, no traceback."""
        for reply in (b"garbage\r\n\r\n", b"HTTP/1.1 101 Sure\r\n\r\n"):
            with self.subTest(reply=reply), socket.socket() as listener:
                listener.bind(("127.0.0.1", 0))
                listener.listen()
                url = f"ws://127.0.0.1:{listener.getsockname()[1]}/"
                # Tornado forgets to close the connection of a 101 that it does not accept,
                # which only "-W error" would say.
                command = [sys.executable, "client.py", "--url", url]
                with subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
                ) as client:
                    for _ in range(2):
                        connection, _address = listener.accept()
                        connection.recv(65_536)
                        connection.sendall(reply)
                        connection.close()
                    _, err = stop(client)
                self.assertEqual(client.returncode, 0)
                for line in err.splitlines():
                    self.assertRegex(line, r"^\S+ cannot connect: .*; next try in \d+\.\d s$")


class SignalTests(ScriptCase):
    def test_server_ends_with_0(self) -> None:
        """Ctrl-C and SIGTERM, once or twice, end the server with status 0 and no traceback."""
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number=number), running("server.py", *FAST) as server:
                first_line(server)
                server.send_signal(number)
                self.assertEqual(stop(server, number), ("", ""))
                self.assertEqual(server.returncode, 0)

    def test_signal_after_the_end_of_the_server_is_ignored(self) -> None:
        """A signal that comes when the event loop is closed already costs no traceback."""
        code = f"""if True:
            import asyncio, os, signal, sys, server
            server.RandomBernoulli.sample = lambda coin: os.kill(os.getpid(), signal.SIGTERM)
            sys.argv = ["server.py", *{FAST}]
            asyncio.run(server.main())
            for number in signal.SIGINT, signal.SIGTERM:
                os.kill(os.getpid(), number)"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_server_ends_whatever_its_clients_do(self) -> None:
        """A client that is never closed, whatever its reason, cannot keep the server from ending."""
        code = f"""if True:
            import asyncio, os, signal, sys, unittest.mock, server
            server.WebSocketServer.clients.add(unittest.mock.Mock(position=0, writing=True))
            server.RandomBernoulli.sample = lambda coin: os.kill(os.getpid(), signal.SIGTERM)
            sys.argv = ["server.py", *{FAST}]
            asyncio.run(server.main())"""
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
            timeout=TIMEOUT,
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_client_ends_with_0_and_its_last_posterior(self) -> None:
        """Ctrl-C and SIGTERM while the client waits print the last posterior; status 0."""
        url = f"ws://127.0.0.1:{free_port()}/websocket"
        for number in (signal.SIGINT, signal.SIGTERM):
            with self.subTest(number=number), running("client.py", "--url", url) as client:
                assert client.stderr is not None
                client.stderr.readline()
                client.send_signal(number)
                out, err = stop(client, number)
                self.assertEqual(client.returncode, 0)
                self.assertEqual(out, "Beta(1, 1)  mean 0.5000  sd 0.2887  trials 0  missed 0\n")
                self.assertNotIn("Traceback", err)

    def test_signal_as_the_client_exits_is_ignored(self) -> None:
        """A second signal that comes while Python clears up does not change the status."""
        code = f"""if True:
            import os, signal, sys, client
            class Late:
                def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
                    kill(pid, number)
            late = Late()
            client.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
            sys.argv = ["client.py", "--url", "ws://127.0.0.1:{free_port()}/websocket"]
            client.main()"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
        )
        self.assertEqual(done.returncode, 0, done.stderr)

    def test_client_ends_in_mid_handshake(self) -> None:
        """A server that accepts and says nothing does not keep the client from ending at once."""
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            url = f"ws://127.0.0.1:{silent.getsockname()[1]}/"
            with running("client.py", "--url", url) as client:
                connection, _ = silent.accept()
                _, err = stop(client)
                connection.close()
                self.assertEqual((client.returncode, err), (0, ""))

    def test_a_peer_that_never_answers_the_close_delays_the_end_by_5_s(self) -> None:
        """SIGTERM with a client that does not answer: Tornado gives up after 5 s; status 0."""
        with running("server.py", *FAST) as server:
            host, port = re.findall(r"//(.*):(\d+)/", first_line(server))[0]
            with socket.create_connection((host, int(port))) as peer:
                peer.sendall(
                    b"GET /websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
                    b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                )
                self.assertTrue(peer.recv(1))
                _, err = stop(server)
                self.assertEqual(server.returncode, 0)
                self.assertNotIn("Traceback", err)


class OptionTests(ScriptCase):
    def run_script(self, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, script, *options]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    def test_a_bad_option_is_one_line_and_status_2(self) -> None:
        """Each bad option is named in one line on standard error, with status 2."""
        cases = [
            (script, option, value)
            for script, option, values in (
                ("server.py", "--port", ["-1", "abc", "65536", "1.5"]),
                ("server.py", "--p", ["-0.1", "1.1", "nan", "x"]),
                ("server.py", "--interval", ["0", "-1", "nan", "inf", "0.5"]),
                ("server.py", "--batch", ["0", "10001", "x"]),
                ("client.py", "--url", ["http://localhost/", "localhost", "", "ws://a:99999"]),
            )
            for value in values
        ]
        with ThreadPoolExecutor() as pool:
            results = pool.map(lambda case: self.run_script(case[0], f"{case[1]}={case[2]}"), cases)
        for (script, option, value), result in zip(cases, results, strict=True):
            with self.subTest(script=script, option=option, value=value):
                self.assertEqual((result.returncode, result.stdout), (2, ""))
                self.assertRegex(result.stderr, rf"^{script}: error: .*{option}.*\n$")

    def test_a_port_in_use_is_one_line_and_status_1(self) -> None:
        """A port that somebody listens on: one line with its number, status 1."""
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = str(other.getsockname()[1])
            result = self.run_script("server.py", "--address", "127.0.0.1", "--port", port)
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertRegex(result.stderr, rf"^server\.py: .*{port}.*in use\n$")

    def test_an_address_that_is_not_here_is_one_line_and_status_1(self) -> None:
        """An address of another machine, or none: one line, status 1."""
        for address in ("203.0.113.1", "no-such-host.invalid", "a..b"):
            with self.subTest(address=address):
                result = self.run_script("server.py", "--address", address, "--port", "0")
                self.assertEqual((result.returncode, result.stdout), (1, ""))
                self.assertRegex(result.stderr, rf"^server\.py: {re.escape(address)}:0: .*\n$")

    def test_help_names_every_option_with_its_default(self) -> None:
        """--help says what the script does, and each option's default."""
        result = self.run_script("server.py", "--help")
        self.assertEqual(result.returncode, 0)
        for text in ("localhost", "8765", "0.72", "100", "1)"):
            self.assertIn(f"default: {text}", result.stdout)
        result = self.run_script("client.py", "--help")
        self.assertIn("default: ws://localhost:8765/websocket", result.stdout)

    def test_listens_on_localhost_only(self) -> None:
        """By default the server is reached through the loopback interface only."""
        with running("server.py", "--port", "0") as server:
            port = int(first_line(server).split(":")[2].split("/")[0])
            with socket.socket() as probe, self.assertRaises(OSError):
                probe.connect(("127.0.0.2", port))  # an address that only "every interface" has

    def test_importing_does_nothing(self) -> None:
        """Importing either script prints, parses and starts nothing."""
        code = "import server, client, threading; assert threading.active_count() == 1"
        result = self.run_script("-c", code, "--not-an-option")
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, "", ""))


class OutputTests(ScriptCase):
    def test_head_ends_quietly(self) -> None:
        """client.py | head -1: one line, no error, status 0."""
        with (
            running("server.py", *FAST) as server,
            running("client.py", "--url", first_line(server)) as client,
        ):
            assert client.stdout is not None
            assert client.stderr is not None
            self.assertRegex(client.stdout.readline(), LINE)
            self.assertIn("connected to", client.stderr.readline())
            client.stdout.close()
            self.assertEqual(client.stderr.read(), "")
            self.assertEqual(client.wait(), 0)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_full_output_is_one_error(self) -> None:
        """Standard output that is full: one line, status 1."""
        # Unbuffered, Python would have nothing left to flush as it exits.
        environment = {
            name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"
        }
        for script, options in (
            ("server.py", FAST),
            ("client.py", ("--url", f"ws://127.0.0.1:{free_port()}/")),
        ):
            with self.subTest(script=script), open("/dev/full", "w", encoding="ascii") as full:
                result = subprocess.run(
                    [sys.executable, "-W", "error", script, *options],
                    stdout=full,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                    env=environment,
                    check=False,
                )
                self.assertEqual(result.returncode, 1)
                errors = [line for line in result.stderr.splitlines() if "cannot" not in line]
                self.assertEqual(len(errors), 1, result.stderr)
                self.assertIn("No space left", errors[0])

    def test_a_log_in_a_file_is_plain_text(self) -> None:
        """With only standard output on a terminal, the log has no escape sequences."""
        master, slave = pty.openpty()
        command = [sys.executable, "-X", "utf8", "client.py"]
        url = f"ws://127.0.0.1:{free_port()}/"
        with subprocess.Popen(
            [*command, "--url", url], stdout=slave, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as client:
            assert client.stderr is not None
            line = client.stderr.readline()
            client.terminate()
        self.assertRegex(line, r"^\d\d:\d\d:\d\d cannot connect")
        os.close(slave)
        os.close(master)

    def terminal(self, columns: int, enough: bytes, *options: str) -> list[str]:
        """Show a stream in a terminal, and return each line that was shown in the one place."""
        with running("server.py", *FAST, *options) as server:
            url = first_line(server)
            master, slave = pty.openpty()
            environment = os.environ | {"PYTHONUTF8": "1", "COLUMNS": str(columns)}
            command = [sys.executable, "-W", "error", "client.py", "--url", url]
            with subprocess.Popen(
                command, stdout=slave, stderr=slave, cwd=ROOT, env=environment
            ) as client:
                os.close(slave)
                screen = b""

                def shown() -> bool:
                    nonlocal screen
                    screen += os.read(master, 65_536)
                    return re.search(enough, screen) is not None

                try:
                    wait_until(shown)
                    client.terminate()
                    self.assertEqual(client.wait(), 0)
                finally:
                    client.kill()
            with contextlib.suppress(OSError):  # which Linux raises once all has been read
                while rest := os.read(master, 65_536):
                    screen += rest
            os.close(master)
        rows = screen.decode().replace("\r\n", "\n").split("\n")
        self.assertEqual(len(rows), 3, rows)  # the line of log, the line in place, and the end
        self.assertEqual(rows[2], "")
        return rows[1].split("\r\x1b[K")[1:]

    def test_a_terminal_shows_one_line_and_the_density(self) -> None:
        """On a terminal the line is rewritten in place, with the density in block characters."""
        for shot in self.terminal(100, rb"trials \d{3,} "):
            self.assertRegex(shot, LINE.pattern + r"  \|[ ▁▂▃▄▅▆▇█]{10,40}\|$")
            self.assertLess(len(shot), 100)

    def test_a_picture_that_does_not_fit(self) -> None:
        """The density over 0..1 is shown whole or, where the line is too long for it, left out."""
        # As few messages as there can be, so that a client that is held up misses none.
        slow = "--batch", "10000", "--interval", "100"
        shots = self.terminal(75, rb"trials \d{6,} ", *slow)
        pictures = [shot.partition("  |")[2] for shot in shots]
        self.assertIn("", pictures)
        for shot, picture in zip(shots, pictures, strict=True):
            self.assertLess(len(shot), 75)
            self.assertRegex(shot, LINE.pattern + r"(  \||$)")
            if picture:
                self.assertRegex(picture, r"^[ ▁▂▃▄▅▆▇█]{5,}\|$")
                self.assertIn("█", picture)


if __name__ == "__main__":
    unittest.main()
