"""Items: an entity that only tests have, with two unique keys and columns called `times` and `expected`.

`slug` is a text that every item has, `code` a number that may be null.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass
from google.rpc import status_pb2
from grpc_tools import protoc
from sqlalchemy import MetaData
from sqlalchemy.orm import Mapped, mapped_column

import roster.v1
from roster.errors import AlreadyExists, NotFound
from service.bulk.builder import BatchBuilder
from service.bulk.operation import Kind, Operation
from service.db.base import Base, BigInt, Entity, text
from service.db.bulk.batch import Batch
from service.db.bulk.table import BulkTable, UniqueKey
from service.db.engine import Database
from service.validation import Rule

FOLDER = Path(__file__).parent
WRITABLE = ("slug", "code", "times", "expected")
ANY = Rule(lambda _: None, lambda _: True)


class ItemNotFound(NotFound):
    reason = "ITEM_NOT_FOUND"


class SlugTaken(AlreadyExists):
    reason = "SLUG_TAKEN"


class CodeTaken(AlreadyExists):
    reason = "CODE_TAKEN"


class ItemRow(Entity):
    """An item, in metadata of its own: no migration creates it."""

    __abstract__ = False
    __tablename__ = "items"
    __table_args__ = ({"sqlite_autoincrement": True},)
    metadata = MetaData(naming_convention=Base.metadata.naming_convention)

    slug: Mapped[str] = mapped_column(text(255), unique=True)
    code: Mapped[int | None] = mapped_column(BigInt, unique=True)
    times: Mapped[int] = mapped_column(BigInt)
    expected: Mapped[str] = mapped_column(text(255))


async def create_table(database: Database) -> None:
    """Create the table of items."""
    async with database.begin() as session:
        await (await session.connection()).run_sync(ItemRow.metadata.create_all)


def _compile_messages(*names: str) -> Iterator[type[Any]]:
    """Compile items.proto, and return the classes of its messages."""
    includes = [
        FOLDER,
        Path(roster.v1.__file__).parents[2],
        Path(status_pb2.__file__).parents[2],  # google/rpc/*.proto
        Path(grpc_tools.__file__).parent / "_proto",
    ]
    with TemporaryDirectory() as folder:
        compiled = Path(folder, "items.binpb")
        arguments = [*(f"-I{include}" for include in includes), f"--descriptor_set_out={compiled}"]
        assert protoc.main(["protoc", *arguments, "items.proto"]) == 0
        [file] = FileDescriptorSet.FromString(compiled.read_bytes()).file
    Default().AddSerializedFile(file.SerializeToString())
    return (GetMessageClass(Default().FindMessageTypeByName(f"{file.package}.{name}")) for name in names)


Item, BulkCreateItemsRequest, BulkUpdateItemsRequest = _compile_messages(
    "Item", "BulkCreateItemsRequest", "BulkUpdateItemsRequest"
)


async def item_batch_from_messages(
    messages: Sequence[Any],
    fields: Collection[str],
    masked: Collection[str],
) -> Batch:
    """Return the fields of items as columns; a code of 0 means none."""
    builder = BatchBuilder(messages)
    await builder.add_identity(fields)
    if "slug" in fields:
        await builder.add("slug", builder.values("slug"), Rule(lambda slug: None if slug else "is required"))
    if "code" in fields:
        await builder.add("code", builder.values_or_none("code"), ANY)
    await builder.add_fields(fields, {"times": ANY, "expected": ANY})
    return builder.batch


def item_not_found() -> ItemNotFound:
    return ItemNotFound("there is no such item")


def slug_taken(existing_id: int | None) -> SlugTaken:
    facts = {"existing_id": existing_id} if existing_id else {}
    return SlugTaken("slug belongs to another item", field="slug", **facts)


def code_taken(existing_id: int | None) -> CodeTaken:
    facts = {"existing_id": existing_id} if existing_id else {}
    return CodeTaken("code belongs to another item", field="code", **facts)


ITEMS = BulkTable(
    ItemRow,
    item_not_found,
    unique=[
        UniqueKey(ItemRow.slug, slug_taken),
        UniqueKey(ItemRow.code, code_taken, placeholder=lambda id: -id),
    ],
    sort_by=ItemRow.slug,
)
CREATE_ITEMS = Operation(BulkCreateItemsRequest, ITEMS, item_batch_from_messages, WRITABLE)
UPDATE_ITEMS = Operation(BulkUpdateItemsRequest, ITEMS, item_batch_from_messages, WRITABLE, kind=Kind.UPDATE)
