"""The operation of a bulk stream on one entity, and the options of a stream."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property

from google.protobuf.message import Message

from roster.errors import InvalidOptions
from roster.v1.bulk_pb2 import BulkOptions
from service.bulk.convert import ToBatch
from service.bulk.message import BulkParser
from service.db.base import Session
from service.db.bulk.batch import Batch, OnConflict, Outcome, WriteOptions
from service.db.bulk.table import BulkTable
from service.db.bulk.writer import BulkWriter
from service.validation import check_choice
from service.wire import mask_paths

IDENTITY = ("id", "version")
RESTORED = (*IDENTITY, "created_at", "updated_at")


class Kind(Enum):
    """The kind of write that a bulk RPC does."""

    CREATE = auto()
    UPDATE = auto()
    DELETE = auto()


@dataclass(frozen=True)
class Operation:
    """One of the bulk RPCs, as data: its messages, its table, and how to convert rows."""

    request: type[Message]
    table: BulkTable
    convert: ToBatch
    writable: Sequence[str]  # the fields that an update may write; its mask names some of them
    create_only: Sequence[str] = ()  # the fields that only a create may write
    kind: Kind = Kind.CREATE
    required_roles: Mapping[str, str] = field(default_factory=dict)  # column -> role that a caller needs

    @cached_property
    def method(self) -> str:
        """The full name of the RPC."""
        request = self.request.DESCRIPTOR
        [service] = request.file.services_by_name.values()
        [method] = [method for method in service.methods if method.input_type == request]
        return method.full_name

    @cached_property
    def rows_field(self) -> str:
        """The field of the request with the rows."""
        [rows] = [field for field in self.request.DESCRIPTOR.fields if field.is_repeated]
        return rows.name

    @cached_property
    def parser(self) -> BulkParser:
        """The parser of its messages."""
        return BulkParser(self.request, self.rows_field)

    @cached_property
    def updatable(self) -> Sequence[str]:
        """The fields that an update mask may name. New rows are matched by unique keys, and keep those."""
        if self.kind is Kind.UPDATE:
            return self.writable
        keys = self.table.unique_among(self.writable)
        names = [key.name for key in keys]
        return [name for name in self.writable if name not in names]

    @cached_property
    def key_names(self) -> Sequence[str]:
        """The columns by which two batches can be in conflict."""
        return ["id", *(key.name for key in self.table.unique)]

    def is_parallel(self, options: WriteOptions) -> bool:
        """Return whether batches without a key in common can be written at the same time.

        Not if unique values are updated: a value that a batch takes may be one that the batch before frees.
        Not if ids are restored: to reserve them, a batch waits for all transactions that have drawn ids.
        """
        # Two updates of one row are handled by their common id; this is about values that change owners.
        updates_keys = self.kind is Kind.UPDATE and bool(self.table.unique_among(options.update_fields))
        return not (options.restores or updates_keys)

    def may_overlap(self, keys: Collection[str], others: Collection[str]) -> bool:
        """Return whether two batches may name a row by different keys, given the columns of their keys."""
        return self.kind is Kind.DELETE and len({*keys, *others}) > 1

    def can_defer(self, options: WriteOptions) -> bool:
        """Return whether a batch can go ahead without the rows whose unique key an uncommitted batch has.

        Such a row fails or is skipped, whatever becomes of the other row: either way a row with that key is
        stored. With several unique keys it is not so simple: if the other row fails by one key, another key
        of it is free. Then the batch waits.
        """
        is_create = self.kind is Kind.CREATE and len(self.table.unique) == 1
        is_rewritten = options.is_atomic or options.validate_only or options.restores
        return is_create and options.on_conflict is not OnConflict.UPDATE and not is_rewritten

    async def batch(self, messages: Sequence[Message], options: WriteOptions) -> Batch:
        """Return the rows of a request as columns."""
        if self.kind is Kind.CREATE:
            fields = [*self.writable, *self.create_only]
        else:
            fields = [*IDENTITY, *options.update_fields]
        if options.restores:
            fields += RESTORED
        return await self.convert(messages, fields, options.update_fields)

    async def write(self, session: Session, batch: Batch, options: WriteOptions) -> Outcome:
        """Write a batch in the session's transaction."""
        writer = BulkWriter(session, self.table)
        match self.kind:
            case Kind.CREATE:
                return await writer.create(batch, options)
            case Kind.UPDATE:
                return await writer.update(batch, options)
            case Kind.DELETE:
                return await writer.delete(batch, options)


@dataclass(frozen=True)
class StreamOptions:
    """The validated options of one stream."""

    write: WriteOptions
    return_ids: bool
    max_failures: int

    @classmethod
    def from_message(cls, message: BulkOptions, operation: Operation) -> "StreamOptions":
        """Return the options of a stream's first message; raises InvalidOptions, InvalidMask."""
        check_choice(message.on_conflict, BulkOptions.OnConflict, "options.on_conflict")
        check_choice(message.atomicity, BulkOptions.Atomicity, "options.atomicity")
        check_choice(message.on_missing, BulkOptions.OnMissing, "options.on_missing")
        if message.max_failures < 0:
            raise _invalid("max_failures", "must not be negative; 0 means any number")
        on_conflict = OnConflict(message.on_conflict)
        is_create, is_delete = operation.kind is Kind.CREATE, operation.kind is Kind.DELETE
        if message.restore and not is_create:
            raise _invalid("restore", "is allowed in a create only")
        if message.on_missing and not is_delete:
            raise _invalid("on_missing", "is allowed in a delete only")
        if message.restrict and not (is_delete and operation.table.dependents):
            raise _invalid("restrict", "is allowed only in a delete of rows to which others refer")
        can_conflict = is_create and (message.restore or operation.table.unique)
        if on_conflict is not OnConflict.FAIL and not can_conflict:
            raise _invalid("on_conflict", "must be FAIL: these rows can't be in conflict with stored ones")
        if on_conflict is OnConflict.UPDATE and message.restore:
            raise _invalid("on_conflict", "must be FAIL or SKIP if rows are restored")
        return cls(
            write=WriteOptions(
                on_conflict=on_conflict,
                is_atomic=message.atomicity == BulkOptions.BATCH,
                validate_only=message.validate_only,
                restores=message.restore,
                update_fields=_update_fields(message, operation, on_conflict),
                skips_missing=message.on_missing == BulkOptions.SKIP_MISSING,
                restricts=message.restrict,
            ),
            return_ids=message.return_ids,
            max_failures=message.max_failures,
        )


def _update_fields(message: BulkOptions, operation: Operation, on_conflict: OnConflict) -> list[str]:
    is_needed = operation.kind is Kind.UPDATE or on_conflict is OnConflict.UPDATE
    if is_needed and not message.update_mask.paths:
        raise _invalid("update_mask", f"is required; it may name {', '.join(operation.updatable)}")
    if not is_needed and message.update_mask.paths:
        can_update = operation.kind is Kind.CREATE and operation.table.unique and not message.restore
        or_update = ", or set on_conflict to UPDATE" if can_update else ""
        raise _invalid("update_mask", f"must be empty if nothing is updated; clear it{or_update}")
    return mask_paths(message.update_mask, operation.updatable, "options.update_mask")


def _invalid(field: str, wrong: str) -> InvalidOptions:
    return InvalidOptions(f"options.{field} {wrong}", field=f"options.{field}")
