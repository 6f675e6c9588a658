"""Every sample in an SQLite database, exactly once, whenever the program is killed.

Run it beside a server, kill it, run it again, and look at what it has:

    python -m tests.recipes.database samples.db --url ws://localhost:8765/websocket
    sqlite3 samples.db "SELECT count(*), avg(sample) FROM samples"

The samples and the position after them are written in one transaction: after a kill the database
has both or neither, and the stream goes on from there. A sample is a row with its epoch and offset,
and its value as JSON. While another program has locked the database, this one waits, and says so;
only at its start it gives up after 5 s. Several programs may read. Ctrl-C ends it, within 5 s if the
database is locked. It needs only Tornado. For another database, replace `read_progress` and `write`.

Its limits: a database is for one stream, and for one program that writes. What leaves the server's
history while the program is away is counted as missed. What comes while the database is locked
gathers in memory.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from client import WebSocketClient, watch

logger = logging.getLogger("client")
TABLES = (
    "samples (epoch TEXT, offset INTEGER, sample TEXT, PRIMARY KEY (epoch, offset))",
    "progress (epoch TEXT, position INTEGER, missed INTEGER)",  # one row, or none at first
)


class DatabaseClient(WebSocketClient):
    """A client that writes each sample into a database, and goes on from what is in there."""

    patience = 5.0  # seconds that a try waits for a database that is locked

    def __init__(self, url: str, path: Path, retry_delay: float = 3) -> None:
        super().__init__(url, retry_delay)
        self.path = path
        self.writer = ThreadPoolExecutor(1)  # one thread, so the transactions keep their order
        self.read_progress()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Open the database, and write all that is done with it, or nothing."""
        # A connection belongs to a thread; to open one takes less time than to write to the disk.
        connection = sqlite3.connect(self.path, timeout=self.patience)
        with contextlib.closing(connection), connection:
            yield connection

    def read_progress(self) -> None:
        """Go on where the database says; make its tables if they are not there."""
        with self.transaction() as database:
            for table in TABLES:
                database.execute(f"CREATE TABLE IF NOT EXISTS {table}")
            for row in database.execute("SELECT epoch, position, missed FROM progress"):
                self.epoch, self.position, self.missed = row

    def write(self, rows: list[tuple[Any, ...]], progress: tuple[Any, ...]) -> None:
        """Write samples and progress in one transaction."""
        with self.transaction() as database:
            # `stop` interrupts on_message, not this. Then the same samples come again, and are here.
            insert = "INSERT INTO samples VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            database.executemany(insert, rows)
            database.execute("DELETE FROM progress")
            database.execute("INSERT INTO progress VALUES (?, ?, ?)", progress)

    async def on_message(self, samples: list[Any]) -> None:
        progress = self.epoch, self.position, self.missed
        numbered = enumerate(samples, self.position - len(samples))
        rows = [(self.epoch, offset, json.dumps(sample)) for offset, sample in numbered]
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self.writer, self.write, rows, progress)
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                    raise
                logger.warning("%s: %s; trying again", self.path, error)

    def __str__(self) -> str:
        return f"position {self.position}  missed {self.missed}"


def main() -> None:
    """Write what the stream has into a database, until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Write each sample into a database, once.")
    parser.add_argument("file", type=Path, help="the database, made when it is not there")
    parser.add_argument("--url", default="ws://localhost:8765/websocket", help="%(default)s")
    options = parser.parse_args()
    try:
        client = DatabaseClient(options.url, options.file)
    except ValueError as error:
        parser.error(str(error))
    except sqlite3.Error as error:
        parser.error(f"{options.file}: {error}")
    watch(client)


if __name__ == "__main__":
    main()
