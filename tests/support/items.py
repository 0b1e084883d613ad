"""Items: an entity that only tests have, with two unique keys and columns called `times` and `expected`.

`slug` is a text that every item has, `code` a number that may be null.
"""

from collections.abc import Collection, Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    OneofDescriptorProto,
)
from google.protobuf.descriptor_pool import Default
from google.protobuf.message_factory import GetMessageClass
from sqlalchemy import MetaData
from sqlalchemy.orm import Mapped, mapped_column

from roster.v1 import bulk_pb2
from service.bulk.convert import add_identity
from service.bulk.operation import Operation
from service.db.base import Base, BigInt, Entity, text
from service.db.bulk.batch import Batch
from service.db.bulk.table import BulkTable, UniqueKey
from service.db.engine import Database
from service.errors import AlreadyExists, NotFound

WRITABLE = ("slug", "code", "times", "expected")


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


def _messages() -> tuple[type[Any], type[Any]]:
    """Return the classes of an item and of a request with items, like those that protoc generates."""
    kinds = FieldDescriptorProto
    item = DescriptorProto(name="Item")
    for number, (name, kind) in enumerate(
        [
            ("id", kinds.TYPE_INT64),
            ("version", kinds.TYPE_INT64),
            ("slug", kinds.TYPE_STRING),
            ("code", kinds.TYPE_INT64),
            ("times", kinds.TYPE_INT64),
            ("expected", kinds.TYPE_STRING),
        ],
        1,
    ):
        item.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    for number, name in enumerate(["created_at", "updated_at"], 7):
        item.field.add(
            name=name,
            number=number,
            type=kinds.TYPE_MESSAGE,
            type_name=".google.protobuf.Timestamp",
            label=kinds.LABEL_OPTIONAL,
        )
    request = DescriptorProto(name="BulkWriteItemsRequest", oneof_decl=[OneofDescriptorProto(name="_offset")])
    request.field.add(
        name="options",
        number=1,
        type=kinds.TYPE_MESSAGE,
        type_name=".roster.v1.BulkOptions",
        label=kinds.LABEL_OPTIONAL,
    )
    request.field.add(
        name="offset",
        number=2,
        type=kinds.TYPE_INT64,
        label=kinds.LABEL_OPTIONAL,
        proto3_optional=True,
        oneof_index=0,
    )
    request.field.add(
        name="items",
        number=3,
        type=kinds.TYPE_MESSAGE,
        type_name=".roster.tests.Item",
        label=kinds.LABEL_REPEATED,
    )
    request.field.add(name="finish", number=4, type=kinds.TYPE_BOOL, label=kinds.LABEL_OPTIONAL)
    file = FileDescriptorProto(
        name="roster/tests/items.proto",
        package="roster.tests",
        syntax="proto3",
        dependency=[bulk_pb2.DESCRIPTOR.name, "google/protobuf/timestamp.proto"],
        message_type=[item, request],
    )
    Default().AddSerializedFile(file.SerializeToString())
    names = ("roster.tests.Item", "roster.tests.BulkWriteItemsRequest")
    item_class, request_class = (GetMessageClass(Default().FindMessageTypeByName(name)) for name in names)
    return item_class, request_class


Item, BulkWriteItemsRequest = _messages()


def item_batch_from_messages(
    messages: Sequence[Any], fields: Collection[str], masked: Collection[str]
) -> Batch:
    """Return the fields of items as columns; a code of 0 means none."""
    batch = Batch(len(messages))
    add_identity(batch, messages, fields)
    if "slug" in fields:
        slugs = [message.slug for message in messages]
        batch.add("slug", slugs, lambda slug: None if slug else "is required")
    if "code" in fields:
        batch.add("code", [message.code or None for message in messages])
    if "times" in fields:
        batch.add("times", [message.times for message in messages])
    if "expected" in fields:
        batch.add("expected", [message.expected for message in messages])
    return batch


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
CREATE_ITEMS = Operation(
    method="roster.tests.ItemService.BulkCreateItems",
    request=BulkWriteItemsRequest,
    rows_field="items",
    fields=WRITABLE,
    writable=WRITABLE,
    read=item_batch_from_messages,
    table=ITEMS,
)
UPDATE_ITEMS = Operation(
    method="roster.tests.ItemService.BulkUpdateItems",
    request=BulkWriteItemsRequest,
    rows_field="items",
    fields=("id", "version"),
    writable=WRITABLE,
    read=item_batch_from_messages,
    table=ITEMS,
    is_update=True,
)
