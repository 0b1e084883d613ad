"""A model of the filter language in plain Python: random filters, their texts, and the rows they match."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple

from hypothesis import strategies as st

from service.users.rules import normalise_email, normalise_email_part


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
    "*",
    "a*",
    "a*b",
    "[a-b]?",
    "\ud7ff",
    "\ue000",
    "\U0010ffff",
    "b\U0010ffffa",
]
TIMES = [
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
    datetime(2024, 2, 29, 12, tzinfo=UTC),
    datetime(2024, 2, 29, 12, 0, 0, 1, tzinfo=UTC),
    datetime(2024, 2, 29, 12, 0, 0, 100000, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
]
IDS = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, *range(611, 619), 2**53]

USERS = [
    UserRow(
        id=IDS[i],
        email=TEXTS[i],
        full_name=None if i % 3 == 0 else TEXTS[-i],
        is_active=i % 2 == 0,
        created_at=TIMES[i % len(TIMES)],
        updated_at=TIMES[-1 - i // 4],
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
        updated_at=TIMES[-1 - i // 4],
    )
    for i in range(len(TEXTS))
]


class Wild(NamedTuple):
    """A text of a filter, with a star before it or after it."""

    before: bool
    text: str
    after: bool


class Moment(NamedTuple):
    """A time of a filter: a microsecond, and the nanoseconds after it."""

    time: datetime
    nanoseconds: int


class Present:
    """The star without quotes."""


@dataclass(frozen=True)
class Comparison:
    field: str
    operator: str
    value: Any
    written: str


@dataclass(frozen=True)
class Not:
    term: "Node"
    written: str = "NOT "


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
    if isinstance(comparison.value, Present):
        return stored is not None
    if stored is None:
        return None
    if isinstance(comparison.value, Moment):
        stored = Moment(stored, 0)
    if isinstance(comparison.value, Wild):
        return _is_like(stored, comparison.value) == (comparison.operator == "=")
    return COMPARED[comparison.operator](stored, comparison.value)


def _is_like(stored: str, wild: Wild) -> bool:
    pattern = f"{'.*' * wild.before}{re.escape(wild.text)}{'.*' * wild.after}"
    return re.fullmatch(pattern, stored, re.DOTALL) is not None


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
            # A minus comes right before a field or a parenthesis.
            inner = _enclosed(node.term, And, Or)
            return f"-({inner})" if inner.startswith("-") and node.written == "-" else node.written + inner
        case And():
            return " AND ".join(write_filter(term) for term in node.terms)
        case Or():
            return " OR ".join(_enclosed(term, And) for term in node.terms)


def _enclosed(node: Node, *looser: type) -> str:
    return f"({write_filter(node)})" if isinstance(node, looser) else write_filter(node)


def _quoted(text: str, quote: str) -> str:
    """Return a string in which no star is a wildcard."""
    return f"{quote}{_escaped(text, quote)}{quote}"


def _escaped(text: str, quote: str) -> str:
    return text.replace("\\", "\\\\").replace(quote, f"\\{quote}").replace("*", "\\*")


def _wildly_quoted(wild: Wild, quote: str) -> str:
    # A star that is not at an end needs no escape.
    escaped = _escaped(wild.text, quote)
    bare = escaped.replace("\\*", "*") if wild.before and wild.after else escaped
    return f"{quote}{'*' * wild.before}{bare}{'*' * wild.after}{quote}"


def _zoned(moment: Moment, minutes: int) -> str:
    try:
        local = moment.time.astimezone(timezone(timedelta(minutes=minutes)))
    except OverflowError:  # the offset leads out of the years 1 to 9999
        local = moment.time
    written = local.isoformat(timespec="microseconds")
    return f'"{written[:26]}{moment.nanoseconds:03}{written[26:]}"'


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
_wild = st.sampled_from([(True, False), (False, True), (True, True)])
_wild_texts = st.tuples(_wild, _texts).map(lambda part: Wild(part[0][0], part[1], part[0][1]))
_written_wild = st.tuples(_wild_texts, st.sampled_from("\"'")).map(
    lambda part: (part[0], _wildly_quoted(*part))
)
_written_wild_emails = _written_wild.map(
    lambda part: (part[0]._replace(text=normalise_email_part(part[0].text)), part[1])
)
_present = st.just((Present(), "*"))
_present_text = st.just((Present(), '"*"'))
_moments = st.tuples(_times, st.just(0) | st.integers(0, 999)).map(lambda part: Moment(*part))
_written_times = st.tuples(_moments, _offsets).map(lambda part: (part[0], _zoned(*part)))
_timestamps = _comparisons(["created_at", "updated_at"], _ORDERED, _written_times)

_user_comparisons = st.one_of(
    _comparisons(["id"], _ORDERED, _written_integers),
    _comparisons(["email"], f"{_ORDERED} :", _written_emails),
    _comparisons(["full_name"], f"{_ORDERED} :", _written_texts),
    _comparisons(["email"], "= !=", _written_wild_emails),
    _comparisons(["full_name"], "= !=", _written_wild),
    _comparisons(["full_name"], "= !=", st.just((None, "null"))),
    _comparisons(["id", "email", "full_name", "is_active", "created_at"], ":", _present),
    _comparisons(["email", "full_name"], ":", _present_text),
    _comparisons(["is_active"], "= !=", st.sampled_from([(True, "true"), (False, "false")])),
    _timestamps,
)
_post_comparisons = st.one_of(
    _comparisons(["id", "author_id"], _ORDERED, _written_integers),
    _comparisons(["title"], f"{_ORDERED} :", _written_texts),
    _comparisons(["title"], "= !=", _written_wild),
    _comparisons(["author_id", "title", "updated_at"], ":", _present),
    _timestamps,
)


def _combined(nodes: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    several = st.lists(nodes, min_size=2, max_size=4)
    negated = st.builds(Not, nodes, st.sampled_from(["NOT ", "-"]))
    return st.one_of(negated, several.map(And), several.map(Or))


user_filters: st.SearchStrategy[Node] = st.recursive(_user_comparisons, _combined, max_leaves=10)
post_filters: st.SearchStrategy[Node] = st.recursive(_post_comparisons, _combined, max_leaves=10)
