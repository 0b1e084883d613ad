"""`roster loads undo`: delete what a bulk load created."""

import asyncio
import json
from collections import Counter, deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, closing, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from shlex import join
from typing import Any, Self

import grpc
from google.protobuf.message import Message

from roster.client import BATCH_ROWS, Backoff, BulkLoader, LoadInterrupted
from roster.errors import InvalidField, LoadNotFound, PermissionDenied, RosterError, TooLarge
from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.posts_pb2 import PostKey
from roster.v1.users_pb2 import UserKey
from service.cli.created import Created, CreatedRows
from service.cli.progress import show_progress
from service.cli.rows import ENTITIES, USERS, Entity
from service.cli.terminal import Target, UsageError, confirm, echo, exit_on_signal, pluralize
from service.memory import collect_rarely

KEYS: dict[str, type[Message]] = {"users": UserKey, "posts": PostKey}
SHOWN = 5  # kept rows of each reason
MAX_SHOWN_NAME = 200  # characters of a load's name in that of its undo
REASONS = {
    "VERSION_MISMATCH": "changed since the load",
    "USER_HAS_POSTS": "the user has posts",
}
MAYBE_CHANGED = "changed since the load, or it can't be ruled out"


def undo(
    target: Target, load_id: str, caller: str, *, is_forced: bool, is_dry: bool, asks: bool, is_json: bool
) -> int:
    """Delete what a load created, after a dry run, and return the exit status: 1 if rows were kept.

    Raises UsageError.
    """
    collect_rarely()
    with _explain_errors(target, None):
        job = asyncio.run(Undo.find(target, load_id, caller, is_forced=is_forced))
    plan = UndoReport(job.load, "", is_json=is_json)
    with _explain_errors(target, plan):
        asyncio.run(job.run(target, plan))
    plan.print()
    if is_dry or not (plan.deleted or job.is_begun):
        if not (is_dry or is_json):
            echo("nothing was deleted")
        return 1 if plan.kept else 0
    if asks and plan.deleted and not _is_confirmed(plan):
        raise UsageError("this was not confirmed, and nothing was deleted; --yes skips the question")
    report = UndoReport(job.load, job.name, is_json=is_json)
    with _explain_errors(target, report):
        asyncio.run(job.run(target, report))
    report.print()
    return 1 if report.kept else 0


@contextmanager
def _explain_errors(target: Target, report: "UndoReport | None") -> Iterator[None]:
    """Exit on a signal, or raise UsageError for an error; both say how far the undo came."""
    unfinished = report.unfinished if report else lambda: "nothing was deleted"
    try:
        with exit_on_signal(lambda: f": {unfinished()}"):
            yield
    except RosterError as failure:
        cause = failure.cause if isinstance(failure, LoadInterrupted) else failure
        raise UsageError(f"{target.explain(cause)}; {unfinished()}") from None


def _is_confirmed(plan: "UndoReport") -> bool:
    return confirm(f"Delete {plan.describe_deleted()}? This can't be undone.")


@dataclass(frozen=True)
class Undo:
    """The deletion of what a load created; `caller` is the load's, as it is named in requests.

    It is a named bulk delete, which survives a crash. Its name is derived from the load. The same command
    therefore continues an undo that was interrupted. After one that is finished, it begins another.
    """

    load: pb.BulkLoad
    caller: str
    name: str
    is_begun: bool
    is_forced: bool

    @classmethod
    async def find(cls, target: Target, load_id: str, caller: str, *, is_forced: bool) -> Self:
        """Return the undo of a load; raises RosterError, and UsageError if the load can't be undone."""
        async with target.channel() as connection:
            stub: Any = BulkServiceStub(connection)
            load = await stub.GetBulkLoad(pb.GetBulkLoadRequest(load_id=load_id, caller=caller))
            if not caller:
                # An admin who names no caller may begin a load of this name, and would then get that one.
                # Other callers can't name any, and need not.
                with suppress(PermissionDenied):
                    await stub.GetBulkLoad(pb.GetBulkLoadRequest(load_id=load_id, caller=load.caller))
                    caller = load.caller
            _refuse(load, caller)
            name, is_begun = await _next_name(stub, load, is_forced=is_forced)
        return cls(load, caller, name, is_begun, is_forced)

    async def run(self, target: Target, report: "UndoReport") -> None:
        """Delete the rows, or find out what would be deleted if the report is of a dry run.

        Raises RosterError.
        """
        entity = entity_of(self.load)
        options = pb.BulkOptions(
            load_id=report.name,
            validate_only=not report.name,
            on_missing=pb.BulkOptions.SKIP_MISSING,
            restrict=entity is USERS and not self.is_forced,
            return_ids=True,  # the loader sends settled rows again, so that the report has all of them
        )
        async with (
            target.channel() as connection,
            show_progress(self.load.created, report.progress),
        ):
            rows = CreatedRows(connection, entity, self.load, self.caller, has_versions=not self.is_forced)
            with closing(rows):
                await rows.prepare()
                await _send_all(connection, entity, options, rows, report)


class UndoReport:
    """The outcomes of the rows that a load created: deleted, already gone, or kept and why.

    `name` is that of the undo, "" in a dry run. With `is_json`, each row that is kept is printed at once:
    there may be millions.
    """

    def __init__(self, load: pb.BulkLoad, name: str, *, is_json: bool) -> None:
        self.name = name
        self._load = load
        self._noun = entity_of(load).name[:-1]
        self._is_json = is_json
        self._printed = -1  # the offset of the last row that was printed
        self.restart()

    def restart(self) -> None:
        """Begin again: the acks of all rows follow."""
        self.deleted = self.deleted_posts = self.gone = self.kept = 0
        self._reasons: Counter[str] = Counter()
        self._first: dict[str, list[Created]] = {}
        self._waiting: deque[Created] = deque()

    def add(self, row: Created) -> None:
        """Add the next row, before it is sent."""
        self._waiting.append(row)

    def settle(self, ack: pb.BulkAck) -> None:
        """Count the rows of an ack."""
        failures = {failure.offset: failure for failure in ack.failures}
        for offset in range(ack.offset, ack.offset + ack.deleted + ack.skipped + ack.failed):
            row = self._waiting.popleft()
            if failure := failures.get(offset):
                self._keep(row, failure)
        self.deleted += ack.deleted
        self.deleted_posts += ack.deleted_posts
        self.gone += ack.skipped
        self.kept += ack.failed

    def _keep(self, row: Created, failure: pb.RowFailure) -> None:
        self._reasons[failure.reason] += 1
        first = self._first.setdefault(failure.reason, [])
        if len(first) < SHOWN:
            first.append(row)
        if self._is_json and row.offset > self._printed:
            self._printed = row.offset
            kept = {"offset": row.offset, "id": row.id, "reason": failure.reason, "message": failure.message}
            echo(json.dumps({"dry_run": not self.name, **kept}))

    def progress(self) -> tuple[int, str]:
        """Return how many rows are settled, and the text of the progress bar."""
        settled = self.deleted + self.gone + self.kept
        if not self.name:
            return settled, f"dry run: {settled:,} rows, {self.deleted:,} to delete, {self.kept:,} to keep"
        return settled, f"{settled:,} rows, {self.deleted:,} deleted, {self.kept:,} kept"

    def unfinished(self) -> str:
        """Return how far an unfinished undo came."""
        if not self.name:
            return "nothing was deleted"
        return f"{self.describe_deleted()} deleted so far; run the same command to continue"

    def describe_deleted(self) -> str:
        """Return how much is deleted, or would be."""
        posts = f" with {pluralize(self.deleted_posts, 'post')}" if self.deleted_posts else ""
        return f"{pluralize(self.deleted, self._noun)}{posts}"

    def print(self) -> None:
        """Print the summary."""
        if self._is_json:
            echo(json.dumps(self._as_dict()))
        else:
            echo(*self._lines())

    def _as_dict(self) -> dict[str, Any]:
        return {
            "dry_run": not self.name,
            "load_id": self._load.load_id,
            "undo_id": self.name or None,
            "created": self._load.created,
            "deleted": self.deleted,
            "deleted_posts": self.deleted_posts,
            "gone": self.gone,
            "kept": self.kept,
            "updated": self._load.updated,
            "reasons": self._reasons,
        }

    def _lines(self) -> Iterator[str]:
        would = "" if self.name else "would be "
        yield (
            f"load {self._load.load_id} created {pluralize(self._load.created, self._noun)}: "
            f"{self.describe_deleted()} {would}deleted, {self.gone:,} already gone, {self.kept:,} {would}kept"
        )
        for reason, number in self._reasons.most_common():
            yield f"  {number:,} x {reason}: {self._meaning(reason)}"
            first = self._first[reason]
            yield from (f"    offset {row.offset:,}: {self._noun} {row.id}" for row in first)
            if number > len(first):
                yield f"    and {number - len(first):,} more"
        if self._load.updated:
            yield (
                f"  the load also made {pluralize(self._load.updated, 'update')}: {self._noun}s that existed "
                "before keep these values; load the former ones from an export, with --update"
            )
        if self.kept and not self.name:
            yield "  --force deletes these rows too, and the posts of these users"
        elif self.kept:
            yield f"  `roster loads show {self.name}` lists them"

    def _meaning(self, reason: str) -> str:
        if reason == "VERSION_MISMATCH" and self._load.options.restore:
            return MAYBE_CHANGED
        return REASONS.get(reason, "refused by the server")


async def _send_all(
    connection: grpc.aio.Channel,
    entity: Entity,
    options: pb.BulkOptions,
    rows: CreatedRows,
    report: "UndoReport",
) -> None:
    """Send the rows, again in smaller messages if the users of one have too many posts."""
    method, request = entity.rpc(connection, "BulkDelete")
    batch_rows, backoff = BATCH_ROWS, Backoff(retry_connect=True)
    while True:
        loader = BulkLoader(
            *(method, request, options), batch_rows=batch_rows, retry_connect=True, connection=connection
        )
        report.restart()
        try:
            return await _send(loader, entity, rows, report)
        except LoadInterrupted as failure:
            if isinstance(failure.cause, TooLarge) and batch_rows > 1:
                batch_rows = max(batch_rows // 10, 1)
            elif options.validate_only:  # it has no name by which the loader could resume it
                await backoff.wait(failure.cause, failure)
            else:
                raise


async def _send(loader: BulkLoader[Any], entity: Entity, rows: CreatedRows, report: "UndoReport") -> None:
    async with (
        aclosing(_keys(entity, rows, report)) as keys,
        aclosing(loader.run(keys)) as events,
    ):
        async for event in events:
            if isinstance(event, pb.BulkAck):
                report.settle(event)


async def _keys(entity: Entity, rows: CreatedRows, report: "UndoReport") -> AsyncGenerator[Message]:
    key: Any = KEYS[entity.name]
    async with aclosing(rows.all()) as created:
        async for row in created:
            report.add(row)
            yield key(id=row.id, version=row.version)


def entity_of(load: pb.BulkLoad) -> Entity:
    """Return the entity whose rows a load writes."""
    return next(entity for entity in ENTITIES.values() if load.method.endswith(entity.name.title()))


def undo_name(load: pb.BulkLoad, number: int, *, is_forced: bool) -> str:
    """Return the name of an undo of a load: of the first, of its successor, and so on."""
    key = json.dumps([load.caller, load.load_id, is_forced])
    digest = sha256(key.encode()).hexdigest()
    # The load's name is for people. The name of an undo may be refused, or too long, where that of a load of
    # an earlier release is not.
    shown = load.load_id[:MAX_SHOWN_NAME] if load.load_id.isprintable() else ""
    return "-".join(filter(None, ["undo", shown, digest[:16], str(number)]))


async def _next_name(stub: Any, load: pb.BulkLoad, *, is_forced: bool) -> tuple[str, bool]:
    """Return the name of the undo to run, and whether an earlier run has begun it."""
    for number in count(1):
        name = undo_name(load, number, is_forced=is_forced)
        try:
            earlier = await stub.GetBulkLoad(pb.GetBulkLoadRequest(load_id=name))
        except (LoadNotFound, InvalidField):  # an admin gets InvalidField if several others have it
            return name, False
        if earlier.state == pb.BulkLoad.OPEN:
            return name, True
    raise AssertionError


def _refuse(load: pb.BulkLoad, caller: str) -> None:
    """Raise UsageError if a load can't be undone."""
    name, rows = f"load {load.load_id}", entity_of(load).name
    if "BulkUpdate" in load.method:
        raise UsageError(
            f"{name} updated {rows}, and their former values are not stored; load them from an older export "
            f"with `roster load {rows} FILE --update --update-mask FIELDS`"
        )
    if "BulkDelete" in load.method:
        raise UsageError(
            f"{name} deleted {rows}, and they are not stored any more; load them from an older export with "
            f"`roster load {rows} FILE --restore`"
        )
    if load.state == pb.BulkLoad.OPEN:
        owner = ["--caller", caller] if caller else []
        command = join(["roster", "loads", "abort", load.load_id, *owner])
        raise UsageError(f"{name} is still open; abort it first, with `{command}`")
    if load.state != pb.BulkLoad.EXPIRED and not load.created:
        raise UsageError(f"{name} has created no {rows}, so there is nothing to undo")
    if load.state == pb.BulkLoad.EXPIRED:
        first, last = load.created_at.ToJsonString(), load.updated_at.ToJsonString()
        raise UsageError(
            f"{name} has expired, and it is not stored any more which {rows} it created; it ran from {first} "
            f"to {last}: export the {rows} that were created then, with `roster export {rows} --filter`, "
            f"keep only those of the load in the file, and run `roster load {rows} FILE --delete`"
        )
