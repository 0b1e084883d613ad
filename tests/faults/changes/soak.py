"""The long form of the tests of the change feed: many histories, some with crashes, and then the mutants."""

import os

# Its fork handlers can crash a child that is forked while another thread is in gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"
os.environ["ROSTER_METRICS_LISTEN"] = ""

import asyncio
import logging
import time
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import asyncpg
import click
from sqlalchemy import make_url

from service.db import migrations
from tests.faults.changes.history import (
    Wrong,
    draw_history,
    draw_history_with_faults,
    replay,
    replay_with_faults,
)
from tests.faults.changes.mutants import MUTANTS, mutant
from tests.faults.histories import SEED, save_if_failed
from tests.support.postgres import PostgresServer

AT_ONCE = 3
FAULTS_EVERY = 5  # histories
MAX_HISTORIES = 20  # in which a mutant must be caught


class Soak:
    """Histories on a server of PostgreSQL, and some on another one, which crashes."""

    def __init__(self, postgres: PostgresServer, mortal: PostgresServer, histories: int) -> None:
        self.postgres, self.mortal = postgres, mortal
        self.histories = histories
        self.begun = 0
        self.began = time.monotonic()
        self._mortal_lock = asyncio.Lock()

    async def run(self) -> None:
        """Run the histories, then the mutants; raises the error of the first history that fails."""
        async with self.postgres.database() as template, self.mortal.database() as mortal_template:
            self.template = str(make_url(template).database)
            self.mortal_template = str(make_url(mortal_template).database)
            for url in (template, mortal_template):
                await asyncio.to_thread(migrations.upgrade, url)
            async with asyncio.TaskGroup() as group:
                for number in range(AT_ONCE):
                    group.create_task(self._run_histories(Random(SEED + number)))
            click.echo(f"{self.histories} histories took {time.monotonic() - self.began:.0f} s")
            caught = [await self._catch(name) for name in MUTANTS]
        if not all(caught):
            raise click.ClickException("the histories have not caught every mutant")

    async def _run_histories(self, random: Random) -> None:
        while self.begun < self.histories:
            self.begun += 1
            number, began = self.begun, time.monotonic()
            if number % FAULTS_EVERY == 0:
                async with self._mortal_lock:
                    faults = await self._run_with_faults(random)
            else:
                faults = await self._run_one(random)
            click.echo(f"{began - self.began:5.0f} s  {number}: {time.monotonic() - began:.0f} s  {faults}")

    async def _run_one(self, random: Random) -> str:
        history = draw_history(random)
        async with self.postgres.database(self.template) as url:
            with save_if_failed("feed", history):
                await replay(history, url)
        return "pruned all the time" if history["prunes"] else ""

    async def _run_with_faults(self, random: Random) -> str:
        history = draw_history_with_faults(random)
        with TemporaryDirectory() as folder:
            async with self.mortal.database(self.mortal_template) as url:
                with save_if_failed("crashed-feed", history):
                    await replay_with_faults(history, url, self.mortal, Path(folder))
        return ", ".join(kind for _, kind in history["faults"])

    async def _catch(self, name: str) -> bool:
        """Return whether a mutant is caught within a number of histories."""
        random = Random(SEED)
        with mutant(name) as sql:
            for number in range(1, MAX_HISTORIES + 1):
                if wrong := await self._mutant_fails(random, sql):
                    click.echo(f"{name}: caught in history {number}: {wrong}")
                    return True
        click.echo(f"{name}: NOT caught in {MAX_HISTORIES} histories")
        return False

    async def _mutant_fails(self, random: Random, sql: str) -> str:
        async with self.postgres.database(self.template) as url:
            if sql:
                await _execute(url, sql)
            try:
                await replay(draw_history(random), url)
            except Wrong as wrong:
                return str(wrong)[:150]
        return ""


async def _execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    await connection.execute(sql)
    await connection.close()


if __name__ == "__main__":
    click.echo(f"seed {SEED}; ROSTER_TEST_SEED={SEED} repeats these histories")
    logging.disable()
    with PostgresServer() as server, PostgresServer() as other:
        asyncio.run(Soak(server, other, int(os.environ.get("HISTORIES") or 200)).run())
    click.echo("no mirror has missed a change, and every mutant was caught")
