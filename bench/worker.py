"""A worker process: it prepares its work, prints `ready`, waits for a line, works, and prints the result."""

import json
import pickle
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Semaphore
from typing import Any

import grpc
from sqlalchemy import make_url

from bench.rows import BATCH, UserRow
from bench.watching import catch_up, idle, latency
from roster.v1.bulk_pb2 import BulkWriteResponse

NAMES = ("created", "updated", "skipped", "failed", "deleted")
WINDOW = 8  # unacknowledged messages
CONNECT_SECONDS = 30
INSERT = "INSERT INTO users (email, full_name, hashed_password, is_active) VALUES (?, ?, ?, ?)"

Work = Callable[[], Any]


def stream(method: str, file: str, address: str) -> Work:
    """Send serialized messages on one stream; the result is its summary and the number of ids returned."""
    messages = _rows(file)
    channel = grpc.insecure_channel(address)
    grpc.channel_ready_future(channel).result(CONNECT_SECONDS)
    call: Any = channel.stream_stream(method, response_deserializer=BulkWriteResponse.FromString)
    return lambda: _load(call, messages)


def executemany(file: str, url: str) -> Work:
    """Insert users with Python's sqlite3, one transaction per batch, with the service's settings."""
    batches = _batches(_rows(file))
    connection = sqlite3.connect(make_url(url).database or "", isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA foreign_keys = ON")

    def work() -> None:
        for batch in batches:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(INSERT, batch)
            connection.execute("COMMIT")

    return work


def _load(call: Any, messages: Sequence[bytes]) -> dict[str, int]:
    window = Semaphore(WINDOW)
    ids: list[int] = []
    response = BulkWriteResponse()
    for response in call(_within(window, messages)):
        if response.ack.HasField("error"):
            raise RuntimeError(f"a message was refused: {response.ack.error.message}")
        if response.HasField("ack"):
            window.release()
            ids.extend(response.ack.ids)
    counts = {name: getattr(response.summary, name) for name in NAMES}
    return {**counts, "ids": len(ids) - ids.count(0)}


def _within(window: Semaphore, messages: Sequence[bytes]) -> Iterator[bytes]:
    for message in messages:
        window.acquire()
        yield message


def _rows(file: str) -> Any:
    return pickle.loads(Path(file).read_bytes())


def _batches(rows: Sequence[UserRow]) -> list[Sequence[UserRow]]:
    return [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]


def main() -> None:
    prepare = TASKS[sys.argv[1]]
    work = prepare(*sys.argv[2:])
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(work()), flush=True)


TASKS: dict[str, Callable[..., Work]] = {
    "stream": stream,
    "executemany": executemany,
    "idle": idle,
    "latency": latency,
    "catch_up": catch_up,
}

if __name__ == "__main__":
    main()
