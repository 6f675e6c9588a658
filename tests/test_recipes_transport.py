"""The recipes that bring the stream over a broker, and to the clients of other libraries."""

import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tornado.httpclient import HTTPRequest
from tornado.testing import gen_test

from tests.support import ROOT, TIMEOUT, PairCase, Recorder, until

NATS_SERVER = shutil.which("nats-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
LIBRARIES = "websockets", "websocket-client"
PYTHON = sys.executable, "-W", "error"

test = gen_test(timeout=20 * TIMEOUT)  # until() fails earlier, and says where


class ProgramCase(PairCase):
    """A test that runs recipes as programs, with their outputs in a folder."""

    def setUp(self) -> None:
        super().setUp()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """Run a command in the folder."""
        files = self.folder / f"{name}.out", self.folder / f"{name}.err"
        with files[0].open("wb") as output, files[1].open("wb") as errors:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdout=output,
                stderr=errors,
                cwd=self.folder,
                env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            )
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)  # before that, since the last one is the first to run
        return process

    def written(self, name: str, end: str = "out") -> str:
        """Return what a program has written so far to one of its outputs."""
        return (self.folder / f"{name}.{end}").read_text()

    async def end(self, process: subprocess.Popen[bytes]) -> None:
        """Press Ctrl-C, and check that the program ends well."""
        process.send_signal(signal.SIGINT)
        await until(lambda: process.poll() is not None)
        self.assertEqual(process.returncode, 0)


class Wanderer(Recorder):
    """A client that tries the next server each time it connects, as a proxy would."""

    def __init__(self, *urls: str) -> None:
        super().__init__(urls[0])
        self.ports = itertools.cycle([urlsplit(url).port for url in urls])
        self.port: int | None = None

    def request(self, url: str) -> HTTPRequest:
        self.port = next(self.ports)
        parts = urlsplit(url)
        return super().request(parts._replace(netloc=f"{parts.hostname}:{self.port}").geturl())


@unittest.skipUnless(NATS_SERVER, "needs nats-server: see tests/requirements.txt")
@unittest.skipUnless(importlib.util.find_spec("nats"), "needs nats-py: see tests/requirements.txt")
class BrokerTests(ProgramCase):
    """Servers that one NATS JetStream stream feeds."""

    async def start_broker(self) -> str:
        """Start a broker on a free port with a store of its own, and return its URL."""
        options = "-js", "-a", "127.0.0.1", "-p", -1, "-sd", "store", "--ports_file_dir", "."
        self.start("nats", NATS_SERVER, *options)
        await until(lambda: [path for path in self.folder.glob("*.ports") if path.stat().st_size])
        (path,) = self.folder.glob("*.ports")
        return str(json.loads(path.read_text())["nats"][0])

    async def start_server(self, name: str, broker: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start a copy of the recipe beside a copy of server.py; return it and its URL."""
        for path in "server.py", "tests/recipes/broker.py":
            shutil.copy(ROOT / path, self.folder)
        process = self.start(name, *PYTHON, "broker.py", "--broker", broker, "serve", 0)
        await until(lambda: self.written(name).endswith("\n"))
        return process, self.written(name).strip()

    async def stored(self, broker: str) -> list[Any]:
        """Return every sample that the broker holds, from the broker itself."""
        nats: Any = importlib.import_module("nats")
        async with await nats.connect(broker) as connection:
            jetstream = connection.jetstream()
            state = (await jetstream.stream_info("samples")).state
            numbers = range(state.first_seq, state.last_seq + 1)
            messages = [await jetstream.get_msg("samples", number) for number in numbers]
            return [json.loads(message.data or b"") for message in messages]

    @test
    async def test_another_server_goes_on_where_a_killed_one_was(self) -> None:
        """A client moves from a killed server to another: nothing is lost, nothing is doubled."""
        broker = await self.start_broker()
        module = "-m", "tests.recipes.broker"
        producer = self.start("producer", *PYTHON, *module, "--broker", broker, "produce")
        first, url = await self.start_server("first", broker)
        second, other = await self.start_server("second", broker)
        client = Wanderer(url, other)
        self.follow(client)
        await until(lambda: client.position >= 10)
        self.assertEqual(client.port, urlsplit(url).port)
        epoch = client.epoch
        first.send_signal(signal.SIGKILL)
        first.wait()
        reached = client.position
        await until(lambda: client.position >= reached + 10)
        self.assertEqual(client.port, urlsplit(other).port)
        self.assertEqual((client.epoch, client.missed), (epoch, 0))
        received = list(client.samples)  # first, since more come while the broker is asked
        stored = await self.stored(broker)
        self.assertEqual(received, stored[: len(received)])
        third, late = await self.start_server("third", broker)  # which has to catch up first
        joiner = Recorder(late)
        self.follow(joiner)
        await until(lambda: joiner.position >= len(stored))
        self.assertEqual(joiner.samples[: len(stored)], stored)
        self.assertEqual((joiner.epoch, joiner.position), (epoch, len(joiner.samples)))
        for process in producer, second, third:
            await self.end(process)
        self.assertEqual(self.written("producer", "err"), "")


@unittest.skipUnless(
    importlib.util.find_spec("websockets") and importlib.util.find_spec("websocket"),
    "needs websockets and websocket-client: see tests/requirements.txt",
)
class OtherLibrariesTests(ProgramCase):
    """Both clients of other libraries, at the same time."""

    async def begin(self) -> list[subprocess.Popen[bytes]]:
        """Start both clients, and wait until they are there."""
        command = *PYTHON, "-m", "tests.recipes.other_libraries", "--url", self.url
        clients = [self.start(name, *command, name) for name in LIBRARIES]
        await until(lambda: len(self.server.clients) == len(clients))
        return clients

    async def assert_counted(self, ones: int, trials: int, missed: int) -> None:
        """Wait until both clients have counted so much."""
        outputs = [self.folder / f"{name}.out" for name in LIBRARIES]
        await until(lambda: all(f" {trials} " in path.read_text() for path in outputs))
        for path in outputs:
            line = path.read_text().splitlines()[-1]
            self.assertEqual(line, f"ones {ones}  trials {trials}  missed {missed}")

    async def drop(self) -> None:
        """Break every connection, as a network does."""
        dropped: Any = set(self.server.clients)
        for client in dropped:
            client.ws_connection.stream.close()
        await until(lambda: not dropped & self.server.clients)

    @test
    async def test_count_each_sample_once_through_a_drop(self) -> None:
        """What comes before, during and after a drop is counted once, and Ctrl-C is quiet."""
        clients = await self.begin()
        coin, ones, trials = random.Random(1), 0, 0
        for _ in range(3):
            samples = [int(coin.random() < 0.72) for _ in range(40)]
            ones, trials = ones + sum(samples), trials + len(samples)
            self.server.send_message(samples)
            await self.assert_counted(ones, trials, 0)
            await self.drop()
        self.server.history_size = 10
        self.server.send_message([1] * 25)
        await self.assert_counted(ones + 10, trials + 10, 15)
        queries = [client.request.query for client in self.server.clients]
        self.assertEqual(queries, [f"epoch={self.server.epoch}&offset={trials}"] * 2)
        for client in clients:
            await self.end(client)
        for name in LIBRARIES:
            lines = r"\A(.*; next try in .* s\n){3}.* missed 15 .*\n\Z"
            self.assertRegex(self.written(name, "err"), lines)

    @test
    async def test_take_a_full_message_of_large_samples(self) -> None:
        """A message of 2 MB, samples that are not 0 or 1, costs just those samples."""
        await self.begin()
        self.server.send_message(["x" * 2_000] * (self.server.message_size - 1) + [1])
        await self.assert_counted(1, 1, 0)
        for name in LIBRARIES:
            lines = r"\A(.* not 0 or 1: 'x{79}\n){999}\Z"
            self.assertRegex(self.written(name, "err"), lines)
