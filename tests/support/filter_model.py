"""A model of the filter language in plain Python: random filters, their texts, and the rows they match."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

from hypothesis import strategies as st

from service.users.rules import normalise_email


class UserRow(NamedTuple):
    id: int
    email: str
    full_name: str | None
    is_active: bool
    created_at: datetime
    updated_at: datetime


class PostRow(NamedTuple):
    id: int
    title: str
    content: str
    author_id: int
    created_at: datetime
    updated_at: datetime


# Texts that code points, UTF-16 units, collations, LIKE and normal forms would each put in another order.
TEXTS = [
    "",
    "a",
    "A",
    "b",
    "ab",
    "é",
    "e\u0301",
    "É",
    "\uff5e",
    "\U0001f600",
    "%",
    "_",
    "a_b",
    "\"'\\",
    " a\n",
]
TIMES = [
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    datetime(2024, 2, 29, 12, tzinfo=UTC),
    datetime(2024, 2, 29, 12, 0, 0, 1, tzinfo=UTC),
    datetime(2024, 2, 29, 12, 0, 0, 100000, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
]
IDS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 2**53]

USERS = [
    UserRow(
        id=IDS[i],
        email=TEXTS[i],
        full_name=None if i % 3 == 0 else TEXTS[-i],
        is_active=i % 2 == 0,
        created_at=TIMES[i % len(TIMES)],
        updated_at=TIMES[-1 - i // 3],
    )
    for i in range(len(TEXTS))
]
POSTS = [
    PostRow(
        id=IDS[i],
        title=TEXTS[i],
        content="",
        author_id=IDS[-1 - i // 2],
        created_at=TIMES[i % len(TIMES)],
        updated_at=TIMES[-1 - i // 3],
    )
    for i in range(len(TEXTS))
]


@dataclass(frozen=True)
class Comparison:
    field: str
    operator: str
    value: Any
    written: str


@dataclass(frozen=True)
class Not:
    term: "Node"


@dataclass(frozen=True)
class And:
    terms: list["Node"]


@dataclass(frozen=True)
class Or:
    terms: list["Node"]


Node = Comparison | Not | And | Or

COMPARED: Mapping[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    ":": operator.contains,
}


def matches(node: Node, row: UserRow | PostRow) -> bool | None:
    """Return the result of SQL for the row: true, false, or None for unknown."""
    match node:
        case Comparison():
            return _compares(node, getattr(row, node.field))
        case Not():
            inner = matches(node.term, row)
            return None if inner is None else not inner
        case And():
            return _decided_by(False, [matches(term, row) for term in node.terms])
        case Or():
            return _decided_by(True, [matches(term, row) for term in node.terms])


def _compares(comparison: Comparison, stored: Any) -> bool | None:
    if comparison.value is None:
        return (stored is None) == (comparison.operator == "=")
    return None if stored is None else COMPARED[comparison.operator](stored, comparison.value)


def _decided_by(decisive: bool, terms: list[bool | None]) -> bool | None:
    if decisive in terms:
        return decisive
    return None if None in terms else not decisive


def write_filter(node: Node) -> str:
    """Write the filter with as few parentheses as possible: OR binds tighter than AND."""
    match node:
        case Comparison():
            return f"{node.field} {node.operator} {node.written}"
        case Not():
            return f"NOT {_enclosed(node.term, And, Or)}"
        case And():
            return " AND ".join(write_filter(term) for term in node.terms)
        case Or():
            return " OR ".join(_enclosed(term, And) for term in node.terms)


def _enclosed(node: Node, *looser: type) -> str:
    return f"({write_filter(node)})" if isinstance(node, looser) else write_filter(node)


def _quoted(text: str, quote: str) -> str:
    escaped = text.replace("\\", "\\\\").replace(quote, f"\\{quote}")
    return f"{quote}{escaped}{quote}"


def _zoned(time: datetime, minutes: int) -> str:
    try:
        return f'"{time.astimezone(timezone(timedelta(minutes=minutes))).isoformat()}"'
    except OverflowError:  # the offset leads out of the years 1 to 9999
        return f'"{time.isoformat()}"'


def _comparisons(
    fields: list[str], operators: str, values: st.SearchStrategy[tuple[Any, str]]
) -> st.SearchStrategy[Comparison]:
    parts = st.tuples(st.sampled_from(fields), st.sampled_from(operators.split()), values)
    return parts.map(lambda part: Comparison(part[0], part[1], *part[2]))


_characters = st.characters(codec="utf-8", exclude_characters="\0")
_texts = st.sampled_from(TEXTS) | st.text(_characters, max_size=5)
_times = st.sampled_from(TIMES) | st.datetimes(timezones=st.just(UTC))
_integers = st.sampled_from(IDS) | st.integers(-(2**63), 2**63 - 1)
_offsets = st.integers(-23 * 60 - 59, 23 * 60 + 59)

_ORDERED = "= != < <= > >="
_written_integers = _integers.map(lambda number: (number, str(number)))
_written_texts = st.tuples(_texts, st.sampled_from("\"'")).map(lambda part: (part[0], _quoted(*part)))
_written_emails = _written_texts.map(lambda part: (normalise_email(part[0]), part[1]))
_written_times = st.tuples(_times, _offsets).map(lambda part: (part[0], _zoned(*part)))
_timestamps = _comparisons(["created_at", "updated_at"], _ORDERED, _written_times)

_user_comparisons = st.one_of(
    _comparisons(["id"], _ORDERED, _written_integers),
    _comparisons(["email"], f"{_ORDERED} :", _written_emails),
    _comparisons(["full_name"], f"{_ORDERED} :", _written_texts),
    _comparisons(["full_name"], "= !=", st.just((None, "null"))),
    _comparisons(["is_active"], "= !=", st.sampled_from([(True, "true"), (False, "false")])),
    _timestamps,
)
_post_comparisons = st.one_of(
    _comparisons(["id", "author_id"], _ORDERED, _written_integers),
    _comparisons(["title"], f"{_ORDERED} :", _written_texts),
    _timestamps,
)


def _combined(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    several = st.lists(nodes, min_size=2, max_size=4)
    return st.one_of(nodes.map(Not), several.map(And), several.map(Or))


user_filters: st.SearchStrategy[Node] = st.recursive(_user_comparisons, _combined, max_leaves=10)
post_filters: st.SearchStrategy[Node] = st.recursive(_post_comparisons, _combined, max_leaves=10)
