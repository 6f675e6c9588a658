"""The recipes with a state in a file: they go on where they were, whenever they are killed.

That each also ends quietly at Ctrl-C, and what it refuses, is in test_recipes.py.
"""

import asyncio
import io
import json
import math
import random
from typing import Any, ClassVar
from unittest import mock
from urllib.parse import urlsplit

from tornado.ioloop import PeriodicCallback

from client import BetaBinomial
from tests.recipes import numbered_source
from tests.recipes.checkpoint import Checkpointed
from tests.support import Recorder, fresh_server, until
from tests.test_recipes import URL, RecipeCase


class CheckpointTests(RecipeCase):
    attributes: ClassVar[dict[str, Any]] = {"history_size": 10**6}

    def saved(self) -> Any:
        return json.loads(self.path.read_bytes()) if self.path.exists() else {"position": 0}

    async def test_kills(self) -> None:
        """A client that is killed again and again counts as much as one that never stopped."""
        coin, chance = random.Random(9), random.Random(10)
        staying = self.recorder(self.url)
        toss = lambda: self.server.send_message([int(coin.random() < 0.3)])
        feeding = PeriodicCallback(toss, 1)
        feeding.start()
        for _ in range(5):
            least = self.saved()["position"] + chance.randint(1, 50)
            client = self.start("checkpoint", self.path, "--url", self.url)
            await until(lambda: self.saved()["position"] >= least)  # noqa: B023
            await asyncio.sleep(chance.random() / 20)  # any moment will do
            client.kill()  # SIGKILL
            self.assertNotIn("Traceback", client.err())
        feeding.stop()
        client = self.copy("checkpoint", self.path, "--url", self.url)
        await client.line()  # it may have nothing left to count
        await until(lambda: self.saved()["position"] == self.server.end == staying.position)
        await self.interrupt(client)
        state = self.saved()
        self.assertEqual(state["posterior"], list(BetaBinomial().update(staying.samples)))
        self.assertEqual((state["missed"], state["refused"]), (0, 0))

    def test_unsaved(self) -> None:
        """What could not be saved is not counted, and the checkpoint before it stays whole."""
        client = Checkpointed(URL, self.path)
        client.on_message([1, 1, 0])
        client.position = 3
        before = self.path.read_bytes()
        for broken in "os.replace", "pathlib.Path.write_text":
            with mock.patch(broken, side_effect=OSError), self.assertRaises(OSError):
                client.on_message([0])
            self.assertEqual(client.posterior, BetaBinomial(3, 2))
            self.assertEqual(self.path.read_bytes(), before)

    def test_prior_and_refused_samples(self) -> None:
        """A prior need not be whole, and a sample that is not 0 or 1 costs that sample."""
        client = Checkpointed(URL, self.path)
        client.epoch, client.posterior = "9f86d081", BetaBinomial(0.5, 0.5)
        with self.assertLogs("client", "WARNING") as log:
            client.on_message([1, "x", None, 0, 1])
        self.assertEqual(log.output, ["WARNING:client:refused 2 samples that are not 0 or 1"])
        again = Checkpointed(URL, self.path)
        self.assertEqual(again.posterior, BetaBinomial(2.5, 1.5))
        self.assertEqual((again.epoch, again.position, again.refused), ("9f86d081", 5, 2))
        self.assertIn("refused 2", str(again))

    def test_damaged(self) -> None:
        """A damaged checkpoint is refused, and not taken in part."""
        Checkpointed(URL, self.path)
        wrong = {"epoch": 1, "position": -1, "missed": True, "refused": 0.5, "posterior": [0, 1]}
        damaged = [json.dumps(self.saved() | {name: wrong[name]}) for name in wrong]
        infinite = json.dumps(self.saved() | {"posterior": [1, math.inf]})
        for text in "", "{", "[]", "{}", "\0", infinite, *damaged:
            with self.subTest(text):
                self.path.write_text(text)
                with self.assertRaisesRegex(ValueError, "is not a checkpoint"):
                    Checkpointed(URL, self.path)


class NumberedSourceTests(RecipeCase):
    async def test_kills(self) -> None:
        """While the server is killed in mid-file again and again, a client gets each row once."""
        chance = random.Random(11)
        rows = [chance.choice([None, *range(50, 150)]) for _ in range(1_000)]
        text = "".join(f"day {n},{'' if row is None else row}\n" for n, row in enumerate(rows))
        self.path.write_text("day,price\n" + text)
        client, port = Recorder(URL), 0
        with self.assertLogs("client") as log:
            for more in [*(chance.randint(10, 60) for _ in range(5)), len(rows)]:
                least = min(client.position + more, len(rows))  # slow before that: in mid-file
                pace = ["--interval", 10 if least < len(rows) else 1]
                server = self.start("numbered_source", self.path, "price", *pace, "--port", port)
                client.url = await server.line()
                port = urlsplit(client.url).port or 0  # the same one from now on
                if not self.following:
                    self.follow(client)
                await until(lambda: client.position >= least)  # noqa: B023
                server.kill()  # SIGKILL
                server.wait()
                self.assertNotIn("Traceback", server.err())
        self.assertEqual(client.samples, rows)  # so all that is computed from them is right
        self.assertEqual((client.epoch, client.missed), (self.path.name, 0))
        self.assertNotRegex(str(log.output), "began anew|HTTP 400")

    async def test_order(self) -> None:
        """Rows sent before are in the log before the server listens; a count is saved first."""
        self.path.write_bytes(b"\xef\xbb\xbfprice\n10\n\xff\n12\n13\n14\n")
        count = self.path.with_name("my file.count")
        count.write_text("3")
        seen: list[tuple[Any, ...]] = []

        class Watched(fresh_server()):  # type: ignore[misc]
            @classmethod
            def send_message(cls, samples: list[Any]) -> None:
                seen.append((cls.end, samples, count.read_text()))
                super().send_message(samples)

        async def serve(*_: object) -> None:
            seen.append(("listens", Watched.end))

        names = mock.patch.multiple(numbered_source, Rows=Watched, serve=serve)
        arguments = ["", str(self.path), "price", "--interval", "1"]
        with names, mock.patch("sys.argv", arguments):
            await numbered_source.main()
        sent = [(0, [10, None, 12], "3"), ("listens", 3), (3, [13], "4"), (4, [14], "5")]
        self.assertEqual(seen, sent)

    def test_bad_rows(self) -> None:
        """A row without a finite number is None, whatever is in it, and the others keep theirs."""
        bad = ["", "b", "b,", "b,x", "b,inf", "b,nan", "b,\ufffd", f"{'b' * 140_000},1", '"b\n,2",']
        for row in bad:
            with self.subTest(row[:20]):
                lines = io.StringIO(f'day,price\r\na,1\r\n{row}\r\n"c\r\n",3\r\n')
                self.assertEqual([*numbered_source.read(lines, "price")], [1, None, 3])
