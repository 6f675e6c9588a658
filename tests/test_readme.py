"""What README.md and the READMEs below it state: programs, names, numbers, transcripts, links.

What the recipes do is tested beside them; what the tables of measurements say is not tested.
"""

import asyncio
import inspect
import math
import re
import textwrap
import unittest
from pathlib import Path
from typing import Any

from tornado.web import Application

import client
import server
from client import BetaBinomial, WebSocketClient
from server import Stream, WebSocketServer, make_app
from tests.support import (
    PATIENCE,
    ROOT,
    QuietCase,
    Recorder,
    following,
    line_with,
    running,
    serving,
    until,
    url_of,
)

README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = [ROOT / "README.md", *sorted((ROOT / "tests").rglob("README.md"))]
INDEX = (ROOT / "tests" / "recipes" / "README.md").read_text(encoding="utf-8")
SOURCE, MODEL, SCRIPT, ASYNCIO = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TWO, OWN, LAST, SLOW, THOUSAND, NEW = re.findall(r"```python\n(.*?)```", INDEX, re.DOTALL)


class ProgramTests(QuietCase):
    def test_source_and_model_of_ones_own(self) -> None:
        """The source sends its prices, and the model follows them."""
        with (
            running("-c", SOURCE.replace("serve(app) ", "serve(app, 0) ")) as source,
            running("-c", MODEL, "--url", url_of(source)) as model,
        ):
            assert model.stdout
            lines = (model.stdout.readline() for _ in range(PATIENCE))
            self.assertIn("highest 101.7  missed 0\n", lines)

    def test_a_source_that_fails_ends_the_server(self) -> None:
        """An exception in play ends the program with its traceback and status 1."""
        with running(
            "-c", SOURCE.replace("101.4", "1 / 0").replace("serve(app) ", "serve(app, 0) ")
        ) as source:
            line_with(source, "ZeroDivisionError")
            self.assertEqual(source.wait(), 1)

    def test_two_programs_import_nothing_they_run(self) -> None:
        """Both programs do nothing when a process pool imports them."""
        for program in (SOURCE, MODEL):
            self.assertIn('if __name__ == "__main__":', program)

    async def test_client_in_a_script(self) -> None:
        """start, stop and connected do what the lines say."""
        app = make_app()
        async with serving(app) as url:
            WebSocketServer.send_message([101.5])
            names: dict[str, object] = {}
            exec(MODEL, {"__name__": "model"}, names)  # noqa: S102
            begin, _, end = SCRIPT.partition("...")
            exec(begin.replace("ws://localhost:8765/websocket", url), names)  # noqa: S102
            follower = names["client"]
            assert isinstance(follower, WebSocketClient)
            await until(lambda: follower.position == 1, lambda: follower.position)
            self.assertTrue(follower.connected)
            await asyncio.to_thread(exec, end.partition("\n")[2], names)
            self.assertFalse(follower.connected)

    async def test_client_in_an_asyncio_program(self) -> None:
        """The group ends when the client is stopped in it."""
        app = make_app()
        async with serving(app) as url:
            lines = ASYNCIO.replace("sleep(60)", "sleep(0.1)")
            names = {"asyncio": asyncio, "client": WebSocketClient(url)}
            code = f"async def program(client):\n{textwrap.indent(lines, '    ')}"
            exec(code, names)  # noqa: S102
            await names["program"](names["client"])  # type: ignore[operator]


class ShortAnswerTests(QuietCase):
    def defined(self, code: str, name: str, **names: object) -> Any:
        """Run the lines of a class, and return the class."""
        names |= {"Any": Any, "WebSocketClient": WebSocketClient, "asyncio": asyncio}
        names["WebSocketServer"] = WebSocketServer
        exec(code, names)  # noqa: S102
        return names[name]

    async def test_two_streams(self) -> None:
        """Both streams of the program have samples of their own."""
        with running("-c", TWO.replace("serve(app)", "serve(app, 0)")) as process:
            url = url_of(process)
            usual, rare = Recorder(url), Recorder(url.replace("websocket", "rare"))
            async with following(usual, rare):
                await until(lambda: usual.position > 1 and rare.position > 1)
            self.assertNotEqual(usual.epoch, rare.epoch)

    async def test_own_application_and_last_word(self) -> None:
        """An application of one's own serves the stream, and its last word arrives."""
        names = {"Application": Application, "Stream": Stream, "WebSocketServer": WebSocketServer}
        own = OWN.replace("await serve(app)", "").replace('("/health", Health), ', "")
        exec(own, names)  # noqa: S102
        serving_code = textwrap.indent(LAST, "    ")
        exec(f"import asyncio\nasync def last(serving):\n{serving_code}", names)  # noqa: S102
        last: Any = names["last"]
        app: Any = names["app"]
        async with serving(app) as url, following(client := Recorder(url)):
            await until(lambda: client.connected)
            await last(asyncio.create_task(asyncio.sleep(0)))
            await until(lambda: client.samples == ["the end"], lambda: client.samples)

    async def test_slow_work(self) -> None:
        """Each sample is worked on."""
        done: list[int] = []
        slow = self.defined(SLOW, "SlowClient", work=done.append)
        async with serving(make_app()) as url:
            WebSocketServer.send_message([*range(10)])
            async with following(slow(url)):
                await until(lambda: sorted(done) == [*range(10)], lambda: done)

    async def test_exactly_1000_and_only_what_is_new(self) -> None:
        """A client stops after 1,000 samples; a joiner of the other server gets no history."""
        thousand = self.defined(THOUSAND, "Thousand")
        only_new = self.defined(NEW, "OnlyNew")
        async with serving(make_app(only_new)) as url:
            only_new.send_message([*range(10)])
            async with following(client := Recorder(url)):
                await until(lambda: client.connected and client.epoch)
                only_new.send_message([*range(10, 1_510)])
                await until(lambda: client.position == 1_510, lambda: client.position)
                self.assertEqual(client.samples, [*range(10, 1_510)])
            first = thousand(url)
            first.epoch, first.position = only_new.stream.epoch, 0
            await first.run()
            self.assertEqual((first.taken, first.position), ([*range(1_000)], 1_000))


class StatementTests(unittest.TestCase):
    def test_files_exist(self) -> None:
        """Every file that a README names or links to is in the tree."""
        for readme in READMES:
            text = readme.read_text(encoding="utf-8")
            links = set(re.findall(r"\]\((?!http)([^)#]+)\)", text))
            files = set(re.findall(r"`(?:tests/)?([\w/]+\.(?:py|txt|html|js|png|svg))`", text))
            for name in (links | files) - {"posterior.txt", "highest.py"}:
                places = [readme.parent, ROOT, *(ROOT / "tests").glob("*/"), ROOT / "tests"]
                found = [place for place in places if (place / name).exists()]
                self.assertTrue(found, f"{name} in {readme}")

    def test_recipes_have_a_row(self) -> None:
        """The index names every recipe that can be run, and README no other."""
        index = (ROOT / "tests" / "recipes" / "README.md").read_text(encoding="utf-8")
        files = {path.stem for path in (ROOT / "tests" / "recipes").glob("*.py")} - {"__init__"}
        self.assertEqual(set(re.findall(r"\]\((\w+)\.py\)", index)), files)
        self.assertLessEqual(set(re.findall(r"tests/recipes/(\w+)\.py", README)), files)
        self.assertLessEqual(len(files), 20)

    def test_options_exist(self) -> None:
        """Every option after server.py or client.py is one of that script."""
        for script, module in (("server.py", server), ("client.py", client)):
            source = inspect.getsource(module.main)
            used = re.findall(rf"{re.escape(script)}((?: --\w+ [^\s`]+)+)", README)
            options = re.findall(r"--\w+", "".join(used))
            self.assertTrue(options)
            for option in options:
                self.assertIn(f'"{option}"', source)

    def test_names_exist(self) -> None:
        """Each public name of the two scripts has a row in the table, and no other name has."""
        rows = re.findall(r"^\| (`.*?`) \| `(\w+)\.py` \|", README, re.MULTILINE)
        for module in (server, client):
            public = {
                name
                for name, thing in vars(module).items()
                if getattr(thing, "__module__", "") == module.__name__ and name[0] != "_"
            }
            named = {
                name
                for names, file in rows
                for name in re.findall(r"\w+", names)
                if file == module.__name__
            }
            self.assertEqual(named, public)

    def test_numbers(self) -> None:
        """The sizes, the true p, the URL and the waits between tries are those of the code."""
        prose = " ".join(README.split())
        self.assertIn(f"the newest {Stream.history_size:,} samples", prose)
        self.assertIn(f"at most {Stream.message_size:,} samples in a message", prose)
        self.assertIn(f"`max_clients` is {WebSocketServer.max_clients}", prose)
        self.assertIn("around the true 0.72", prose)
        self.assertIn("default=0.72", inspect.getsource(server.main))
        self.assertIn('default="ws://localhost:8765/websocket"', inspect.getsource(client.main))
        delay = inspect.signature(WebSocketClient).parameters["retry_delay"].default
        waits = [min(30, delay * 2**attempt) for attempt in range(5)]
        self.assertIn("up to {} s, then {}, {}, {}, {}".format(*waits), prose)

    def test_statistics(self) -> None:
        """The formulas, and the sd after 600 trials, are what BetaBinomial gives."""
        a, b = posterior = BetaBinomial().update([1] * 432 + [0] * 168)
        self.assertEqual(posterior, (1 + 432, 1 + 600 - 432))
        self.assertAlmostEqual(posterior.sd, math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))))
        self.assertIn(f"about {posterior.sd:.3f}", " ".join(README.split()))

    def test_transcripts(self) -> None:
        """Each line of the transcripts is one that the client prints for these counts."""
        lines = re.findall(r"^ *(▕.*▏ Beta\((\d+), (\d+)\).*)$", README, re.MULTILINE)
        self.assertGreaterEqual(len(lines), 5)
        shown = WebSocketClient("ws://localhost/")
        for line, alpha, beta in lines:
            shown.posterior = BetaBinomial(int(alpha), int(beta))
            self.assertEqual(line, str(shown))

    def test_promise(self) -> None:
        """The promise stands there in its exact words."""
        promise = (
            "Within one run of the server, each sample is counted exactly once while the history "
            "covers the gap; otherwise the client says how many it missed. When the server has "
            "begun anew, the client says that too."
        )
        self.assertIn(promise, " ".join(README.split()))

    def test_scripts_stand_alone(self) -> None:
        """Neither script imports the other, and requirements.txt has only Tornado."""
        for name, other in (("server.py", "client"), ("client.py", "server")):
            source = Path(ROOT / name).read_text(encoding="utf-8")
            self.assertNotRegex(source, rf"(?m)^(from|import) {other}")
        self.assertRegex((ROOT / "requirements.txt").read_text(), r"^tornado[^\n]*\n$")
