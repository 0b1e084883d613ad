"""What a bulk stream does to one entity, and the options that it accepts."""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from google.protobuf.message import Message

from roster.v1.bulk_pb2 import BulkOptions
from service.bulk.message import BulkParser
from service.db.base import Entity, Session
from service.db.bulk.batch import Batch, OnConflict, Outcome, WriteOptions
from service.errors import InvalidOptions, RosterError
from service.timeslice import slices
from service.validation import check_choice
from service.wire import mask_paths

RESTORED = ("id", "version", "created_at", "updated_at")
# To read a row takes 1 µs, or 100 if its e-mail has nothing but combining marks.
ROWS_AT_ONCE = 100


@dataclass(frozen=True)
class Operation:
    """One of the bulk RPCs: where its rows are, how they are read, how they are written."""

    method: str  # the full name of the RPC
    request: type[Message]
    rows: str  # the field of the request that has them
    fields: Sequence[str]  # what is read of each row, for an update beside what its mask names
    writable: Sequence[str]  # what an update mask may name
    read: Callable[[Sequence[Any], Collection[str], Collection[str]], Batch]
    model: type[Entity]
    write: Callable[[Session, Batch, WriteOptions], Awaitable[Outcome]]
    is_update: bool = False
    taken: Callable[[int | None], RosterError] | None = None  # where rows have a key: that it is taken

    @cached_property
    def parser(self) -> BulkParser:
        """What parses the messages of its streams."""
        return BulkParser(self.request, self.rows)

    def is_parallel(self, options: WriteOptions) -> bool:
        """Tell whether batches with different keys can be written at the same time.

        Not where e-mails are updated: one that a batch takes may be one that the batch before gives up.
        Nor where ids are restored: to reserve them a batch waits for all that have drawn some.
        """
        return not (options.restores or (self.is_update and "email" in options.update_fields))

    def can_defer(self, options: WriteOptions) -> bool:
        """Tell whether rows whose keys an earlier batch has can be left until that is written."""
        is_insert = bool(self.taken) and options.on_conflict is not OnConflict.UPDATE
        return is_insert and not (options.is_atomic or options.validate_only or options.restores)

    async def batch(self, messages: Sequence[Any], options: WriteOptions) -> Batch:
        """Return the messages of a request as columns, read in time slices."""
        fields = self.fields
        if self.is_update:
            fields = (*fields, *options.update_fields)
        elif options.restores:
            fields = (*fields, *RESTORED)
        batch = Batch(0)
        async for some in slices(messages, ROWS_AT_ONCE):
            batch.extend(self.read(some, fields, options.update_fields))
        return batch


@dataclass(frozen=True)
class StreamOptions:
    """The options of one stream, checked."""

    write: WriteOptions
    return_ids: bool
    max_failures: int

    @classmethod
    def from_message(cls, message: BulkOptions, operation: Operation) -> "StreamOptions":
        """Return the options of a stream's first message; raises InvalidOptions, InvalidMask."""
        check_choice(message.on_conflict, BulkOptions.OnConflict, "options.on_conflict")
        check_choice(message.atomicity, BulkOptions.Atomicity, "options.atomicity")
        if message.max_failures < 0:
            raise _invalid("max_failures", "must not be negative; 0 means any number")
        on_conflict = OnConflict(message.on_conflict)
        if message.restore and operation.is_update:
            raise _invalid("restore", "makes no sense for an update")
        if on_conflict is not OnConflict.FAIL and not (operation.taken or message.restore):
            raise _invalid("on_conflict", "makes no sense here: there is no key that could be taken")
        if on_conflict is OnConflict.UPDATE and message.restore:
            raise _invalid("on_conflict", "must be FAIL or SKIP where rows are restored")
        return cls(
            write=WriteOptions(
                on_conflict=on_conflict,
                is_atomic=message.atomicity == BulkOptions.BATCH,
                validate_only=message.validate_only,
                restores=message.restore,
                update_fields=_update_fields(message, operation, on_conflict),
            ),
            return_ids=message.return_ids,
            max_failures=message.max_failures,
        )


def _update_fields(message: BulkOptions, operation: Operation, on_conflict: OnConflict) -> list[str]:
    is_needed = operation.is_update or on_conflict is OnConflict.UPDATE
    if is_needed and not message.update_mask.paths:
        raise _invalid("update_mask", f"is required; it may name {', '.join(operation.writable)}")
    if not is_needed and message.update_mask.paths:
        raise _invalid(
            "update_mask", "makes no sense where nothing is updated; set on_conflict to UPDATE, or drop it"
        )
    return mask_paths(message.update_mask, operation.writable, "options.update_mask")


def _invalid(field: str, wrong: str) -> InvalidOptions:
    return InvalidOptions(f"options.{field} {wrong}", field=f"options.{field}")
