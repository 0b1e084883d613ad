"""SQL that compares a column with a value of a filter."""

import operator
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import BindParameter, ColumnElement, Integer, String, and_, literal, not_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from service.db.base import ColumnType, Expression, UtcDateTime

COMPARE: Mapping[str, Callable[..., ColumnElement[bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
# Unicode has no characters from U+D800 to U+DFFF.
BEFORE_SURROGATES, AFTER_SURROGATES, LAST = "\ud7ff", "\ue000", "\U0010ffff"


class strpos(GenericFunction[int]):  # noqa: N801  (reads as SQL)
    """The position of one text in another, in code points from 1; 0 if it is not there."""

    type = Integer()
    inherit_cache = True


@compiles(strpos, "sqlite")
def _instr(element: strpos, compiler: SQLCompiler, **options: Any) -> str:
    return f"instr({compiler.process(element.clauses, **options)})"


class right(GenericFunction[str]):  # noqa: N801  (reads as SQL)
    """The last code points of a text, at most as many as it has."""

    type = String()
    inherit_cache = True


@compiles(right, "sqlite")
def _substr(element: right, compiler: SQLCompiler, **options: Any) -> str:
    text, length = (compiler.process(clause, **options) for clause in element.clauses)
    return f"substr({text}, -{length})"


class Pattern(NamedTuple):
    """A text in which a wildcard may stand for any other text before it and after it."""

    text: str
    is_open_left: bool = False
    is_open_right: bool = False


class Instant(NamedTuple):
    """A time down to the microsecond, and whether it lies between that one and the next."""

    microsecond: datetime
    is_between: bool = False


def compare(column: Expression, operation: str, value: Any, kind: ColumnType) -> ColumnElement[bool]:
    """Compare a column with a value; the operators are those of `COMPARE`."""
    return COMPARE[operation](column, literal(value, kind))


def matches(column: Expression, pattern: Pattern) -> ColumnElement[bool]:
    """Return the condition that a text matches a pattern, unknown for null. An index finds a prefix."""
    match pattern:
        case Pattern(text, False, False):
            return column == _bound(text)
        case Pattern(text, False, True) | Pattern("" as text, True, _):
            return _starts_with(column, text)
        case Pattern(text, True, False):
            return right(column, len(text)) == _bound(text)
    return contains(column, pattern.text)


def contains(column: Expression, text: str) -> ColumnElement[bool]:
    """Return the condition that a text contains another, unknown for null."""
    return strpos(column, _bound(text)) > 0


def compare_time(column: Expression, operation: str, instant: Instant) -> ColumnElement[bool]:
    """Compare a column of microseconds with a time that may be more precise, exactly.

    Every stored time up to `instant.microsecond` is before a time in between, and every other one after it.
    """
    time = literal(instant.microsecond, UtcDateTime())
    if not instant.is_between:
        return COMPARE[operation](column, time)
    if operation in {"<", "<="}:
        return column <= time
    if operation in {">", ">="}:
        return column > time
    # No stored time is equal. A constant would be false for null too, which is to be unknown.
    is_equal = and_(column <= time, column > time)
    return is_equal if operation == "=" else not_(is_equal)


def _starts_with(column: Expression, prefix: str) -> ColumnElement[bool]:
    # A range, since both databases compare by code point: the index finds it, and LIKE would need escapes.
    end = end_of_prefix(prefix)
    if end is None:
        return column >= _bound(prefix)
    return and_(column >= _bound(prefix), column < _bound(end))


def end_of_prefix(prefix: str) -> str | None:
    """Return the first text, by code point, after all that start with the prefix; None if there is none."""
    kept = prefix.rstrip(LAST)
    if not kept:
        return None
    last = kept[-1]
    following = AFTER_SURROGATES if last == BEFORE_SURROGATES else chr(ord(last) + 1)
    return kept[:-1] + following


def _bound(text: str) -> BindParameter[str]:
    return literal(text, String())
