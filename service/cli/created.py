"""The rows that a bulk load created, and the versions that it left them with."""

import json
import sqlite3
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from datetime import UTC, timedelta
from functools import partial
from typing import Any, NamedTuple

import grpc

from roster.client import Backoff, pages
from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from service.cli.rows import Entity
from service.cli.terminal import PAGE_SIZE

# A change sets `updated_at` to the start of its transaction, which may be a little before the load began.
MARGIN = timedelta(minutes=1)


class Created(NamedTuple):
    """A row that the load created, and the version that it has if it has not changed since; 0 for any."""

    offset: int
    id: int
    version: int


class CreatedRows:
    """The rows that one load created, in the order of the load; `caller` is named in the requests.

    Without `has_versions`, any version is expected of a row.

    A row begins with version 1. If the load met its key again and updated it, the version is one more for
    each time.

    The versions of restored rows come from a file, and the load does not know them. A row with version 1 has
    never changed. One that was last updated before the load began has not changed since then, and is expected
    to keep its version. Any other may have changed: version 1 is expected, which it does not have.
    """

    def __init__(
        self,
        connection: grpc.aio.Channel,
        entity: Entity,
        load: pb.BulkLoad,
        caller: str,
        *,
        has_versions: bool,
    ) -> None:
        self._load = load
        self._has_versions = has_versions
        self._stub: Any = BulkServiceStub(connection)
        self._request = pb.ListBulkLoadRowsRequest(load_id=load.load_id, caller=caller, page_size=PAGE_SIZE)
        self._entity = entity
        self._batch_get, self._batch_request = entity.rpc(connection, "BatchGet")
        self._backoff = Backoff(retry_connect=True)
        self._backoff.watch(connection)
        self._updates = UpdateCounts()

    async def prepare(self) -> None:
        """Find out which versions to expect; raises RosterError.

        Not while a stream is open: it reads all rows of a load that has updated some, and the server ends a
        stream to which nothing is sent.
        """
        if self._has_versions and self._load.updated:
            await self._count_updates()

    async def all(self) -> AsyncGenerator[Created]:
        """Yield the rows; raises RosterError."""
        async with aclosing(self._chunks()) as chunks:
            async for rows in chunks:
                ids = [row.id for row in rows]
                expected = await self._versions(ids)
                for row, version in zip(rows, expected, strict=True):
                    yield Created(row.offset, row.id, version)

    def close(self) -> None:
        """Delete the temporary file."""
        self._updates.close()

    async def _chunks(self) -> AsyncGenerator[list[pb.BulkLoadRow]]:
        """Yield the rows that the load created, some at a time."""
        chunk: list[pb.BulkLoadRow] = []
        async with aclosing(self._rows()) as rows:
            async for row in rows:
                if row.outcome == pb.BulkLoadRow.CREATED:
                    chunk.append(row)
                if len(chunk) == PAGE_SIZE:
                    yield chunk
                    chunk = []
        if chunk:
            yield chunk

    def _rows(self) -> AsyncGenerator[Any]:
        return pages(partial(self._backoff.call, self._stub.ListBulkLoadRows), self._request)

    async def _count_updates(self) -> None:
        """Count the updates of rows that the load may have created.

        A row is created before it is updated. So an id below all that were created so far is that of a row
        that existed before: a load that updates ten million of those need not remember them.
        """
        smallest: int | None = None
        async with aclosing(self._rows()) as rows:
            async for row in rows:
                if row.outcome == pb.BulkLoadRow.CREATED:
                    smallest = min(row.id, smallest or row.id)
                elif row.outcome == pb.BulkLoadRow.UPDATED and smallest and row.id >= smallest:
                    self._updates.add(row.id)

    async def _versions(self, ids: Sequence[int]) -> Sequence[int]:
        if not self._has_versions:
            return [0] * len(ids)
        return await self._restored(ids) if self._load.options.restore else self._updates.versions(ids)

    async def _restored(self, ids: Sequence[int]) -> list[int]:
        """Return the versions to expect of restored rows."""
        began = self._load.created_at.ToDatetime(UTC) - MARGIN
        versions = dict.fromkeys(ids, 1)
        remaining = ids
        while remaining:
            found = await self._backoff.call(self._batch_get, self._batch_request(ids=remaining))
            for row in getattr(found, self._entity.name):
                if row.updated_at.ToDatetime(UTC) < began:
                    versions[row.id] = row.version
            remaining = found.remaining_ids
        return [versions[id] for id in ids]


class UpdateCounts:
    """How often a load has updated rows, by id: in a temporary file, because there may be millions."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE counts (id INTEGER PRIMARY KEY, updates INTEGER NOT NULL)")

    def add(self, id: int) -> None:
        """Count an update."""
        self._database.execute(
            "INSERT INTO counts VALUES (?, 1) ON CONFLICT DO UPDATE SET updates = updates + 1", [id]
        )

    def versions(self, ids: Sequence[int]) -> list[int]:
        """Return the version that the load left of each row that it created: one more for each update."""
        found = self._database.execute(
            "SELECT id, updates FROM counts WHERE id IN (SELECT value FROM json_each(?))", [json.dumps(ids)]
        )
        updates = dict(found.fetchall())
        return [1 + updates.get(id, 0) for id in ids]

    def close(self) -> None:
        """Delete the file."""
        self._database.close()
