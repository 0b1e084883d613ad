"""The long form of the crash tests: one random history after the other, for so many seconds."""

import os

# Its handlers make the child of a fork crash that comes while another thread is in gRPC.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

import asyncio
import logging
import time
from itertools import count, cycle
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import click

from tests.faults.crash import drawn, replay
from tests.faults.histories import SEED
from tests.support.postgres import PostgresServer


async def soak(postgres: PostgresServer, seconds: float) -> None:
    """Try histories until the time is over; raises what the first one that fails raises."""
    random, begin = Random(SEED), time.monotonic()
    for number, database in zip(count(1), cycle(["postgresql", "sqlite"]), strict=False):
        elapsed = time.monotonic() - begin
        if elapsed > seconds:
            return
        history = drawn(random, database)
        faults = ", ".join(kind for _, _, kind in history["faults"])
        click.echo(
            f"{elapsed:5.0f} s  {number}  {database}, {history['batch_rows']} rows a message: {faults}"
        )
        with TemporaryDirectory() as folder:
            await replay(history, postgres, Path(folder))


if __name__ == "__main__":
    click.echo(f"seed {SEED}; with ROSTER_TEST_SEED={SEED} the same histories come again")
    logging.basicConfig(level=logging.ERROR)
    with PostgresServer(fsync=True) as server:
        asyncio.run(soak(server, float(os.environ.get("SECONDS", "600"))))
    click.echo("nothing was lost, nothing was doubled")
