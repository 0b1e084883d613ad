"""Base classes of all models, naming conventions, and column types."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NewType, TypeAlias, cast

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    Dialect,
    Identity,
    Integer,
    MetaData,
    Select,
    String,
    Text,
    inspect,
)
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

# The session of `Database.read()`; and that of `Database.begin()` and `bulk()`, which can also write.
ReadSession = NewType("ReadSession", AsyncSession)
Session = NewType("Session", ReadSession)

Column: TypeAlias = InstrumentedAttribute[Any]  # of a model
ColumnType: TypeAlias = TypeEngine[Any]
Expression: TypeAlias = ColumnElement[Any] | Column  # SQL for one value
Query: TypeAlias = Select[Any]
Values: TypeAlias = Mapping[str, Any]  # the values of a row, by column
KeyValue: TypeAlias = int | str  # the value of a unique column

BigInt = BigInteger().with_variant(Integer(), "sqlite")  # SQLite autoincrements INTEGER only


def text(length: int | None = None) -> String:
    """Return a text type that compares by code point on both databases."""
    kind = String if length else Text
    return kind(length).with_variant(kind(length, collation="C"), "postgresql")


class UtcDateTime(TypeDecorator[datetime]):
    """A time in UTC, to the microsecond. SQLite stores it without a time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or dialect.name != "sqlite":
            return value
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value and value.replace(tzinfo=UTC)

    def result_processor(
        self, dialect: Dialect, coltype: Any
    ) -> Callable[[datetime], datetime | None] | None:
        # PostgreSQL's times have a time zone already. Processing each would add half to the cost of a row.
        return super().result_processor(dialect, coltype) if dialect.name == "sqlite" else None


class Xid8(UserDefinedType[int]):
    """The id of a transaction of PostgreSQL, which is never used again."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


ischema_names["xid8"] = Xid8  # otherwise SQLAlchemy warns of every table that has one


class now(FunctionElement[datetime]):  # noqa: N801  (reads as SQL)
    """The start of the transaction by the database's clock, which all servers share."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(now)
def _now(element: now, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    return "now()"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: SQLCompiler, **options: Any) -> str:  # noqa: ARG001
    # SQLite's clock has milliseconds. Padded to the six digits that DateTime writes, text sorts by time.
    return "(strftime('%Y-%m-%d %H:%M:%f000', 'now'))"


class Base(DeclarativeBase):
    """Names every constraint, so that a migration can drop it and an error can be recognised by it."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Entity(Base):
    """The columns of every resource: an id that is never reused, two times, and a version for checks."""

    __abstract__ = True

    id: Mapped[int] = mapped_column(BigInt, Identity(), primary_key=True, sort_order=-1)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now(), sort_order=1)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=now(), sort_order=1)
    version: Mapped[int] = mapped_column(BigInt, server_default="1", sort_order=1)


def model_of(column: Column) -> type[Entity]:
    """Return the model that a column belongs to."""
    return cast("type[Entity]", column.class_)


def column_names(model: type[Entity]) -> tuple[str, ...]:
    """Return the names of the columns that reads select, in order: all but the deferred ones."""
    return tuple(column.key for column in inspect(model).column_attrs if not column.deferred)
