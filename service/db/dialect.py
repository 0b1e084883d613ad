"""What the two databases say differently, each behind one name."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ARRAY, Integer, Subquery, bindparam, column, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeEngine


def is_sqlite(session: AsyncSession) -> bool:
    """Tell whether the session speaks to SQLite."""
    return session.get_bind().dialect.name == "sqlite"


def insert(session: AsyncSession, entity: Any) -> Any:
    """Return an INSERT that knows ON CONFLICT; both databases spell it alike."""
    return sqlite.insert(entity) if is_sqlite(session) else postgresql.insert(entity)


def listed(session: AsyncSession, values: Sequence[int] | Sequence[str], kind: TypeEngine[Any]) -> Subquery:
    """Return the values as a table with the columns `value` and `position`.

    They travel as one parameter, so that the statement is prepared once for any number of them.
    """
    if is_sqlite(session):
        each = func.json_each(json.dumps(values)).table_valued(column("value", kind), column("key", Integer))
        return select(each.c.value, each.c.key.label("position")).subquery()
    array = bindparam(None, values, type_=ARRAY(kind), unique=True)
    rows = func.unnest(array).table_valued(column("value", kind), with_ordinality="position").render_derived()
    return select(rows.c.value, rows.c.position).subquery()


class octets(FunctionElement[int]):  # noqa: N801  (reads as SQL)
    """The size of a text in bytes of UTF-8; PostgreSQL tells it without reading a long one."""

    type = Integer()
    inherit_cache = True


@compiles(octets)
def _octets(element: octets, compiler: Any, **options: Any) -> str:
    return f"octet_length({compiler.process(element.clauses, **options)})"


@compiles(octets, "sqlite")
def _octets_sqlite(element: octets, compiler: Any, **options: Any) -> str:
    return f"length(CAST({compiler.process(element.clauses, **options)} AS BLOB))"
