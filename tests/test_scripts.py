"""Both scripts do in a terminal and in a pipe what their users expect."""

import base64
import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import unittest
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

from client import BetaBinomial
from tests.support import HANDSHAKE, ROOT, accepts, first_line, free_port, running, wait_until

LINE = re.compile(
    r"▕[ ▁▂▃▄▅▆▇█]{20}▏ Beta\((?P<alpha>\d+), (?P<beta>\d+)\)"
    r"  mean (?P<mean>[01]\.\d{4})  sd (?P<sd>0\.\d{4})  missed (?P<missed>\d+)"
)
FLAT = "▕" + 20 * "█" + "▏ Beta(1, 1)  mean 0.5000  sd 0.2887  missed 0\n"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # of RFC 6455
FAST = ("--port", "0", "--address", "127.0.0.1", "--interval", "1")


def stop(process: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    """Send a signal, and return what the process has written to both outputs by its end."""
    assert process.stdout and process.stderr
    process.send_signal(number)
    # communicate() would pass over what readline() has buffered.
    out, err = process.stdout.read(), process.stderr.read()
    process.wait()
    return out, err


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


class ScriptCase(unittest.TestCase):
    def setUp(self) -> None:
        # Nobody listens here, until a test does.
        self.port = free_port()
        self.url = f"ws://127.0.0.1:{self.port}/websocket"

    def follow(self, client: subprocess.Popen[str], enough: int) -> str:
        """Read lines, whose counts never go down, until one has enough trials, and return it."""
        assert client.stdout
        trials = 0
        for line in client.stdout:
            match = LINE.fullmatch(line.rstrip("\n"))
            assert match, line
            self.assertLessEqual(len(match[0]), 80)
            self.assertGreaterEqual(int(match["alpha"]) + int(match["beta"]) - 2, trials)
            trials = int(match["alpha"]) + int(match["beta"]) - 2
            if trials >= enough:
                return match[0]
        raise AssertionError("the output ended")

    def said(self, process: subprocess.Popen[str], text: str) -> str:
        """Read the log until a line has this text, and return it."""
        assert process.stderr
        for line in process.stderr:
            if text in line:
                return line
        raise AssertionError("the log ended")


class PairTests(ScriptCase):
    def test_server_first(self) -> None:
        """The URL that server.py prints is what client.py follows; Ctrl-C shows the last line."""
        with running("server.py", *FAST) as server:
            url = first_line(server)
            self.assertRegex(url, r"^ws://127\.0\.0\.1:\d+/websocket$")
            with running("client.py", "--url", url) as client:
                line = self.follow(client, 100)
                out, err = stop(client)
                self.assertEqual(client.returncode, 0)
            self.assertRegex(err, r"^\d\d:\d\d:\d\d connected to ws://\S+\n$")
            match = LINE.fullmatch([line, *out.splitlines()][-1])
            assert match
            posterior = BetaBinomial(int(match["alpha"]), int(match["beta"]))
            self.assertEqual(match["mean"], f"{posterior.mean:.4f}")
            self.assertEqual(match["sd"], f"{posterior.sd:.4f}")
            self.said(server, " closed, 0 in all")
            self.assertEqual(stop(server), ("", ""))
            self.assertEqual(server.returncode, 0)

    def test_client_first_and_a_restart(self) -> None:
        """A client that is there first waits; after a restart it says so, and keeps its counts."""
        # Slow enough for the history to hold the new run until the client is back.
        options = *FAST, "--port", str(self.port), "--interval", "10"
        with running("client.py", "--url", self.url) as client:
            self.said(client, "cannot connect: [Errno")
            with running("server.py", *options) as server:
                self.assertEqual(first_line(server), self.url)
                self.follow(client, 50)
                stop(server)
            self.said(client, "closed by the server: 1001 'going away'; next try in ")
            with running("server.py", *options):
                line = self.said(client, "the server began anew")
                followed = re.search(r"; its last run was followed to (\d+)$", line)
                assert followed
                self.assertGreaterEqual(int(followed[1]), 50)
                last = self.follow(client, int(followed[1]) + 50)
                self.assertTrue(last.endswith("missed 0"))

    def test_two_clients_agree_to_the_last_digit(self) -> None:
        """After the server has gone, both clients' last lines are the same."""
        with running("server.py", *FAST) as server:
            url = ("--url", first_line(server))
            with running("client.py", *url) as first, running("client.py", *url) as second:
                lines = [self.follow(first, 50), self.follow(second, 100)]
                stop(server)
                for client, line in zip((first, second), lines[:2], strict=True):
                    self.said(client, "closed by the server: 1001")
                    lines.append([line, *stop(client)[0].splitlines()][-1])
                self.assertEqual(lines[2], lines[3])

    def test_p_and_batch_are_what_the_stream_shows(self) -> None:
        """With --p 1 every sample is a 1, --batch of them per message."""
        options = "--p", "1", "--batch", "1000", "--interval", "100"
        with running("server.py", *FAST, *options) as server:
            with running("client.py", "--url", first_line(server)) as client:
                line = self.follow(client, 100)
            self.assertRegex(line, r" Beta\(\d+001, 1\)  mean ")

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
        with running("server.py", *FAST) as server:
            result = run_script("-W", "error", "-c", code, "--url", first_line(server))
        self.assertEqual(result.returncode, 0)
        self.assertRegex(result.stdout, "^(none\n)*(some\n)+$")
        self.assertRegex(result.stderr, "^.* connected to .*\n$")


class SignalTests(ScriptCase):
    def test_server_ends_with_0_and_tells_its_clients(self) -> None:
        """Ctrl-C and SIGTERM end the server with status 0, and its clients are told 1001."""
        for number in (signal.SIGINT, signal.SIGTERM):
            with (
                self.subTest(number=number),
                running("server.py", *FAST) as server,
                running("client.py", "--url", first_line(server)) as client,
            ):
                self.said(server, " connected, 1 in all")
                out, err = stop(server, number)
                self.assertEqual((server.returncode, out), (0, ""))
                self.assertRegex(err, r"^\S+ client \S+ closed, 0 in all\n$")
                self.said(client, "closed by the server: 1001 'going away'")

    def test_a_second_signal_ends_the_servers_goodbye(self) -> None:
        """While a client does not answer the close, a second signal ends the server quietly."""
        with running("server.py", *FAST) as server:
            port = int(first_line(server).split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port)) as peer, peer.makefile("rb") as got:
                peer.sendall(HANDSHAKE)
                self.said(server, " connected, 1 in all")
                server.send_signal(signal.SIGTERM)
                frame = b""
                while not frame.endswith(b"\x88\x0c\x03\xe9going away"):  # the Close frame, 1001
                    byte = got.read(1)
                    self.assertTrue(byte)
                    frame += byte
                out, err = stop(server, signal.SIGTERM)
            self.assertRegex(out + err, r"^(\S+ client \S+ closed, 0 in all\n)?$")
            self.assertEqual(server.returncode, 0)

    def test_client_ends_in_mid_wait(self) -> None:
        """Ctrl-C while the client waits for its next try: the last posterior, status 0."""
        with running("client.py", "--url", self.url) as client:
            self.said(client, "cannot connect")
            out, err = stop(client)
            self.assertEqual(client.returncode, 0)
            self.assertRegex(out, f"^({FLAT.replace('(', '[(]').replace(')', '[)]')})+$")
            self.assertNotIn("Traceback", err)

    def test_sigterm_keeps_its_default(self) -> None:
        """SIGTERM ends the client as it ends any program, also while its output is blocked."""
        out, into = os.pipe()
        self.addCleanup(os.close, out)
        os.set_blocking(into, False)
        try:
            while True:
                os.write(into, bytes(4_096))
        except BlockingIOError:
            os.set_blocking(into, True)
        command = [sys.executable, "client.py", "--url", self.url]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=into, stderr=pipe, text=True, cwd=ROOT) as client:
            os.close(into)
            self.said(client, "cannot connect")
            self.said(client, "cannot connect")  # the line that is blocked does not hold it up
            client.terminate()
            self.assertEqual(client.wait(), -signal.SIGTERM)

    def test_client_ends_whatever_its_peer_does(self) -> None:
        """Ctrl-C ends the client in mid-handshake, and a second one its wait for the close."""
        for answers in (False, True):
            with self.subTest(answers=answers), socket.create_server(("127.0.0.1", 0)) as listener:
                url = f"ws://127.0.0.1:{listener.getsockname()[1]}/"
                with running("client.py", "--url", url) as client:
                    peer, _ = listener.accept()
                    with peer, peer.makefile("rb") as request:
                        lines = iter(request.readline, b"\r\n")
                        fields = dict(line.strip().split(b": ") for line in lines if b": " in line)
                        if answers:
                            key = fields[b"Sec-Websocket-Key"] + GUID
                            accept = base64.b64encode(hashlib.sha1(key).digest()).decode()
                            head = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
                            head += "Connection: Upgrade\r\nSec-WebSocket-Accept: "
                            peer.sendall(f"{head}{accept}\r\n\r\n".encode())
                            self.said(client, "connected to")
                            client.send_signal(signal.SIGINT)
                            self.assertEqual(request.read(1), b"\x88")  # its Close frame
                        self.assertEqual(stop(client)[1], "")
                    self.assertEqual(client.returncode, 0)


class OptionTests(ScriptCase):
    def test_a_bad_option_is_one_line_and_status_2(self) -> None:
        """Each bad option costs one line on standard error, with status 2."""
        bad = {
            ("server.py", "--port"): ["-1", "abc", "65536", "1.5"],
            ("server.py", "--address"): [""],
            ("server.py", "--p"): ["-0.1", "1.1", "nan", "x"],
            ("server.py", "--interval"): ["0", "-1", "nan", "inf", "0.5"],
            ("server.py", "--batch"): ["0", "-1", "x"],
            ("client.py", "--url"): [
                "http://localhost/",
                "localhost",
                "",
                "ws://a:99999",
                "ws://u:pw@a/",
            ],
        }
        cases = [(script, f"{option}={v}") for (script, option), vs in bad.items() for v in vs]
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(lambda case: run_script(*case), cases)
        for case, result in zip(cases, results, strict=True):
            with self.subTest(case=case):
                self.assertEqual((result.returncode, result.stdout), (2, ""))
                self.assertRegex(result.stderr, rf"^{case[0]}: error: .*\n$")
                self.assertNotIn("pw", result.stderr)
        for script in ("server.py", "client.py"):
            result = run_script(script, "--unknown")
            self.assertEqual((result.returncode, result.stdout), (2, ""))
            self.assertRegex(result.stderr, rf"{script}: error: .*--unknown\n$")

    def test_where_it_cannot_listen_is_one_line_and_status_1(self) -> None:
        """A port in use, or an address that is not here: one line that names both, status 1."""
        with socket.create_server(("127.0.0.1", self.port)):
            for address in ("127.0.0.1", "203.0.113.1", "no-such-host.invalid", "a..b"):
                with self.subTest(address=address):
                    options = "--address", address, "--port", str(self.port)
                    result = run_script("server.py", *options)
                    self.assertEqual((result.returncode, result.stdout), (1, ""))
                    place = rf"{re.escape(address)}:{self.port}"
                    self.assertRegex(result.stderr, rf"^cannot listen on {place}: .*\n$")

    def test_help_names_every_option_with_its_default(self) -> None:
        """--help says what the script does, and each option's default."""
        result = run_script("server.py", "--help")
        self.assertEqual(result.returncode, 0)
        for text in ("localhost", "8765", "0.72", "100", "1"):
            self.assertIn(f"({text})\n", result.stdout)
        self.assertIn("ws://localhost:8765/websocket", run_script("client.py", "--help").stdout)

    def test_importing_does_nothing(self) -> None:
        """Importing either script prints, parses and starts nothing."""
        code = "import server, client, threading; assert threading.active_count() == 1"
        result = run_script("-c", code, "--not-an-option")
        self.assertEqual((result.returncode, result.stdout, result.stderr), (0, "", ""))


class OutputTests(ScriptCase):
    def test_a_bad_handshake_is_one_line(self) -> None:
        """A port that answers garbage, or a 101 that is wrong: one line a try, no traceback."""
        for reply in (b"garbage\r\n\r\n", b"HTTP/1.1 101 Sure\r\n\r\n"):
            with self.subTest(reply=reply), socket.create_server(("127.0.0.1", 0)) as listener:
                url = f"ws://127.0.0.1:{listener.getsockname()[1]}/"
                # Tornado forgets to close the connection of a 101 that it does not accept,
                # which only "-W error" would say.
                command = [sys.executable, "client.py", "--url", url]
                pipe = subprocess.PIPE
                with subprocess.Popen(
                    command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT
                ) as client:
                    for _ in range(2):
                        connection, _address = listener.accept()
                        with connection:
                            connection.recv(65_536)
                            connection.sendall(reply)
                        self.assertIn("; next try in ", self.said(client, "cannot connect: "))
                    self.assertEqual(stop(client)[1], "")
                self.assertEqual(client.returncode, 0)

    def test_head_ends_quietly(self) -> None:
        """client.py | head -1: one line, no error, status 0."""
        with (
            running("server.py", *FAST) as server,
            running("client.py", "--url", first_line(server)) as client,
        ):
            assert client.stdout and client.stderr
            self.assertRegex(client.stdout.readline(), LINE)
            self.said(client, "connected to")
            client.stdout.close()
            self.assertEqual(client.stderr.read(), "")
            self.assertEqual(client.wait(), 0)

    def test_closed_output_is_quiet(self) -> None:
        """With >&- both scripts work without a word, until Ctrl-C, with status 0."""
        shell = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-W", "error"]
        pipe = subprocess.PIPE
        server = [*shell, "server.py", "--address", "127.0.0.1", "--port", str(self.port)]
        client = [*shell, "client.py", "--url", self.url]
        for command in (client, server):
            with subprocess.Popen(command, stderr=pipe, text=True, cwd=ROOT) as process:
                if command is client:
                    self.said(process, "cannot connect")
                else:
                    wait_until(lambda: accepts(self.port))
                process.send_signal(signal.SIGINT)
                assert process.stderr
                self.assertNotIn("Error", process.stderr.read().replace("[Errno", ""))
                self.assertEqual(process.wait(), 0)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_full_output_is_one_error(self) -> None:
        """Standard output that is full: one line, status 1."""
        command = [sys.executable, "-W", "error", "client.py", "--url", self.url]
        # Unbuffered, Python would have nothing left to flush as it exits.
        environment = {name: os.environ[name] for name in os.environ.keys() - {"PYTHONUNBUFFERED"}}
        with open("/dev/full", "w", encoding="ascii") as full:
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, stdout=full, stderr=pipe, text=True, cwd=ROOT, env=environment
            )
            _, err = process.communicate()
        lines = [line for line in err.splitlines() if "cannot connect" not in line]
        self.assertEqual(lines, ["standard output: [Errno 28] No space left on device"])
        self.assertEqual(process.returncode, 1)

    def test_an_ascii_output_has_no_picture(self) -> None:
        """Where the encoding has no block characters there are the numbers, and no traceback."""
        ascii_only = mock.patch.dict(os.environ, {"PYTHONIOENCODING": "ascii"})
        with ascii_only, running("client.py", "--url", self.url) as client:
            self.assertEqual(first_line(client), FLAT.partition("▏ ")[2].rstrip())
            self.assertNotIn("Traceback", stop(client)[1])
            self.assertEqual(client.returncode, 0)


if __name__ == "__main__":
    unittest.main()
