"""The long form of the crash tests: random histories one after another, for a number of seconds."""

import os

# Its fork handlers can crash a child that is forked while another thread is in gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import asyncio
import logging
import time
from itertools import count, cycle
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import click

from tests.faults.crash import draw_history, replay
from tests.faults.histories import SEED
from tests.support.postgres import PostgresServer


async def soak(postgres: PostgresServer, seconds: float) -> None:
    """Run random histories for some seconds; raises the error of the first one that fails."""
    random, begin = Random(SEED), time.monotonic()
    for number, database in zip(count(1), cycle(["postgresql", "sqlite"]), strict=False):
        elapsed = time.monotonic() - begin
        if elapsed > seconds:
            return
        history = draw_history(random, database)
        faults = ", ".join(kind for _, _, kind in history["faults"])
        click.echo(
            f"{elapsed:5.0f} s  {number}  {database}, {history['batch_rows']} rows a message: {faults}"
        )
        with TemporaryDirectory() as folder:
            await replay(history, postgres, Path(folder))


if __name__ == "__main__":
    click.echo(f"seed {SEED}; ROSTER_TEST_SEED={SEED} repeats these histories")
    logging.basicConfig(level=logging.ERROR)
    with PostgresServer(fsync=True) as server:
        asyncio.run(soak(server, float(os.environ.get("SECONDS", "600"))))
    click.echo("no row was lost or duplicated")
