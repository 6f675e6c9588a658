"""What README.md and the READMEs below it state: code, names, numbers, transcripts, links.

What the recipes do is tested in test_recipes_*.py; what the tables of measurements say is not tested.
"""

import ast
import asyncio
import inspect
import re
import unittest
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tornado.web import RequestHandler

import client
import server
from client import BetaBinomial, WebSocketClient
from server import Stream, WebSocketServer, make_app
from tests.programs import running, url_of
from tests.support import ROOT, QuietCase, Recorder, following, serving, until

RECIPES = ROOT / "tests" / "recipes"
README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = (RECIPES / "README.md").read_text(encoding="utf-8")


def code_of(text: str) -> list[str]:
    """Return the Python blocks, unchanged but for the port, for which any free one is taken."""
    with_any_port = text.replace("serve(app)", "serve(app, 0)")
    return re.findall(r"```python\n(.*?)```", with_any_port, re.DOTALL)


SOURCE, MODEL, SCRIPT, ASYNCIO = code_of(README)
TWO, OWN, LAST, SLOW, THOUSAND, NEW = code_of(INDEX)


def replace(block: str, part: str, by: str) -> str:
    """Replace a part of a block, which must be there."""
    assert part in block, block
    return block.replace(part, by)


async def run_block(block: str, **given: Any) -> SimpleNamespace:
    """Run a block as a notebook does, where `await` may stand anywhere, and return its names.

    The block can use what is given, and every name of the two scripts; it is not the main program.
    """
    names = vars(server) | vars(client) | {"__name__": "block"} | given
    code = compile(block, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if coroutine := eval(code, names):  # None, if there is no `await` in the block
        await coroutine
    return SimpleNamespace(**names)


class MakeItYoursTests(QuietCase):
    def test_source_and_model(self) -> None:
        """The source sends its prices, and the model follows them."""
        with (
            running("-c", SOURCE) as source,
            running("-c", MODEL, "--url", url_of(source)) as model,
        ):
            assert model.stdout
            self.assertIn("highest 101.7  missed 0\n", model.stdout)

    def test_source_that_fails(self) -> None:
        """An exception in play ends the program with its traceback and status 1."""
        with running("-c", replace(SOURCE, "101.4", "1 / 0")) as source:
            self.assertIn("ZeroDivisionError", source.communicate()[1])
        self.assertEqual(source.returncode, 1)

    async def test_client_in_a_script(self) -> None:
        """It follows the source in a thread, until it is stopped."""
        model = await run_block(MODEL)
        with running("-c", SOURCE) as source:
            block = replace(SCRIPT, "ws://localhost:8765/websocket", url_of(source))
            block = replace(block, "...", "await until(lambda: client.price)")
            script = await run_block(block, Highest=model.Highest, until=until)
            self.assertFalse(script.client.connected)

    async def test_client_in_a_coroutine(self) -> None:
        """It follows the source until it is stopped, and the program goes on."""
        model = await run_block(MODEL)
        with running("-c", SOURCE) as source:
            follower = model.Highest(url_of(source))
            block = replace(ASYNCIO, "asyncio.sleep(60)", "until(lambda: client.price)")
            await run_block(block, client=follower, until=until)
            self.assertFalse(follower.connected)


class ShortAnswerTests(QuietCase):
    async def test_two_streams(self) -> None:
        """Both streams of the program have samples of their own."""
        with running("-c", TWO) as process:
            url = url_of(process)
            usual, rare = Recorder(url), Recorder(url.replace("websocket", "rare"))
            async with following(usual, rare):
                await until(lambda: usual.position > 1 and rare.position > 1)
        self.assertNotEqual(usual.epoch, rare.epoch)

    async def test_own_application_and_last_word(self) -> None:
        """The application serves the stream, and a client gets the last word before the end."""
        own = await run_block(OWN, Health=RequestHandler, serve=mock.AsyncMock())
        async with serving(own.app) as url, following(follower := Recorder(url)):
            await until(lambda: follower.connected)
            await run_block(LAST, serving=mock.Mock(spec=asyncio.Task))
            self.assertEqual([handler.position for handler in WebSocketServer.clients], [1])
            await until(lambda: follower.samples == ["the end"])

    async def test_slow_work(self) -> None:
        """Each sample is worked on."""
        done: list[int] = []
        slow = await run_block(SLOW, work=done.append)
        async with serving(make_app()) as url, following(slow.SlowClient(url)):
            WebSocketServer.send_message([*range(10)])
            await until(lambda: sorted(done) == [*range(10)], lambda: done)

    async def test_exactly_1000_samples(self) -> None:
        """The client takes a part of the second message, and stops."""
        thousand = await run_block(THOUSAND)
        async with serving(make_app()) as url:
            WebSocketServer.stream.message_size = 600
            WebSocketServer.send_message([*range(1_200)])
            follower = thousand.Thousand(url)
            await until(asyncio.create_task(follower.run()).done)
        self.assertEqual((follower.taken, follower.position), ([*range(1_000)], 1_000))

    async def test_only_what_is_new(self) -> None:
        """A joiner gets no history; one who comes back goes on where it was."""
        handler = (await run_block(NEW)).OnlyNew
        async with serving(make_app(handler)) as url:
            handler.send_message(["old"])
            joiner, returning = Recorder(url), Recorder(url)
            returning.epoch = handler.stream.epoch
            async with following(joiner, returning):
                await until(lambda: joiner.epoch and returning.samples)
                handler.send_message(["new"])
                await until(lambda: joiner.position == returning.position == 2)
        self.assertEqual((joiner.samples, returning.samples), (["new"], ["old", "new"]))


class StatementTests(unittest.TestCase):
    def test_files(self) -> None:
        """Every file that a README names or links to is in the tree."""
        for readme in (ROOT / "README.md", *(ROOT / "tests").rglob("README.md")):
            text = readme.read_text(encoding="utf-8")
            for link in re.findall(r"\]\((?!http)([^)#]+)", text):
                self.assertTrue((readme.parent / link).exists(), f"{link} in {readme}")
            names = re.findall(r"`(?:tests/)?([\w/]+\.(?:py|txt|html|js|png|svg))`", text)
            for name in set(names) - {"prices.py", "highest.py", "posterior.txt"}:
                found = [*ROOT.glob(name), *(ROOT / "tests").rglob(name)]
                self.assertTrue(found, f"{name} in {readme}")

    def test_recipes(self) -> None:
        """The index links to every recipe; README says that there are twenty."""
        recipes = {path.name for path in RECIPES.glob("*.py")} - {"__init__.py"}
        self.assertEqual(set(re.findall(r"\]\((\w+\.py)\)", INDEX)), recipes)
        self.assertEqual(len(recipes), 20)

    def test_options(self) -> None:
        """Every option of a command that README shows is one of that script."""
        for script in (server, client):
            commands = re.findall(rf"{script.__name__}\.py (--[^`]*)`", README)
            shown = re.findall(r"--\w+", " ".join(commands))
            self.assertTrue(shown)
            options = re.findall(r'"(--\w+)"', inspect.getsource(script.main))
            self.assertLessEqual(set(shown), set(options))

    def test_names(self) -> None:
        """Each class and function of the scripts has a row in the table, and no other name has."""
        for script in (server, client):
            rows = re.findall(rf"^\| (.*) \| `{script.__name__}\.py` \|", README, re.MULTILINE)
            source = inspect.getsource(script)
            defined = re.findall(r"^(?:class|def|async def) (\w+)", source, re.MULTILINE)
            self.assertCountEqual(re.findall(r"\w+", " ".join(rows)), defined)

    def test_numbers(self) -> None:
        """The sizes, the waits between tries and the standard deviation are those of the code."""
        wait = WebSocketClient("ws://localhost/").retry_delay
        prose = " ".join(README.split())
        self.assertIn(f"the newest {Stream.history_size:,} samples", prose)
        self.assertIn(f"at most {Stream.message_size:,} samples in a message", prose)
        self.assertIn(f"`max_clients` is {WebSocketServer.max_clients}", prose)
        self.assertIn(f"up to {wait} s, then {2 * wait}, {4 * wait}, {8 * wait}, 30", prose)
        self.assertIn(f"the sd is about {BetaBinomial(1 + 432, 1 + 168).sd:.3f}", prose)

    def test_transcripts(self) -> None:
        """Each line of the transcripts is one that the client prints for these counts."""
        lines = re.findall(r"^ *(▕.*▏ Beta\((\d+), (\d+)\).*)$", README, re.MULTILINE)
        self.assertGreaterEqual(len(lines), 5)
        shown = WebSocketClient("ws://localhost/")
        for line, alpha, beta in lines:
            shown.posterior = BetaBinomial(int(alpha), int(beta))
            self.assertEqual(line, str(shown))
