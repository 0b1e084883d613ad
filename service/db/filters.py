"""Translates the filter and order_by of lists and exports to SQLAlchemy expressions.

The filter language is that of AIP-160 (https://google.aip.dev/160), in which OR binds tighter than AND;
order_by is that of AIP-132. `docs/filtering.md` describes both for callers.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedToken
from lark.parsers.lalr_interactive_parser import InteractiveParser
from sqlalchemy import BigInteger, Boolean, ColumnElement, Integer, String, and_, not_, or_

from roster.errors import InvalidFilter, InvalidOrder
from service.db.base import Expression, UtcDateTime
from service.db.comparisons import Instant, Pattern, compare, compare_time, contains, matches
from service.timeslice import TimeSlice

MAX_CHARACTERS = 2_000
MAX_DEPTH = 20

Columns = Mapping[str, Expression]


class Order(NamedTuple):
    """The sort order of a list; ids break ties."""

    field: str
    descending: bool


async def condition(
    text: str,
    columns: Columns,
    normalise: Mapping[str, Callable[[str], str]] = {},
    spellings: Mapping[str, Callable[[str], Sequence[str]]] = {},
) -> ColumnElement[bool] | None:
    """Return the filter as an expression over the columns, None if it is blank.

    The type of a column decides which operators and values are allowed. `normalise` maps a field to a
    function that is applied to a text, or to a part of one, before it is compared. `spellings` maps a field
    to a function that returns the texts to look for in place of a whole one. A filter has at most 2,000
    characters, nested at most 20 deep. Raises InvalidFilter; its fact `position` counts characters from 1.
    """
    if len(text) > MAX_CHARACTERS:
        raise _error(MAX_CHARACTERS, f"a filter has at most {MAX_CHARACTERS:,} characters")
    if not text.strip():
        return None
    time_slice = TimeSlice()
    tree = await _parse(text, time_slice)
    return await _expression(tree, _Fields(columns, normalise, spellings), time_slice)


def parse_order(text: str, fields: Collection[str]) -> Order:
    """Return the order of `field`, `field asc` or `field desc`; by `id` if the text is blank.

    Raises InvalidOrder; its fact `position` counts characters from 1.
    """
    match text.split():
        case []:
            return Order("id", descending=False)
        case [field, *direction] if field in fields and direction in ([], ["asc"], ["desc"]):
            return Order(field, descending=direction == ["desc"])
    allowed = (fields, ("asc", "desc"), ())
    words = zip(re.finditer(r"\S+", text), allowed, strict=False)
    position = next(word.start() for word, choices in words if word[0] not in choices) + 1
    raise InvalidOrder(
        f"at character {position}: expected one field ({', '.join(fields)}), then asc, desc or nothing; "
        "ties are always broken by id",
        field="order_by",
        position=position,
    )


# A word ends only at a space, a bracket, a quote or an operator. So a value that a caller forgot to quote,
# such as foo@example.org, is one word, and the error can point at it. No field takes a DECIMAL: it is a token
# so that the error can say what the field takes.
_PARSER = Lark(
    r"""
    ?start: conjunction
    ?conjunction: disjunction ("AND" disjunction)*
    ?disjunction: term ("OR" term)*
    ?term: comparison
         | "(" conjunction ")"
         | ("NOT" | MINUS) term -> negation
    comparison: WORD OPERATOR (STRING | INTEGER | DECIMAL | TRUE | FALSE | NULL | STAR)

    OPERATOR: /[!<>]=|[=<>:]/
    STRING: /"(\\.|[^"\\])*"|'(\\.|[^'\\])*'/s
    INTEGER.2: /-?[0-9]+(\.0+)?(?![^\s()=!<>:"'])/
    DECIMAL.1: /-?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?(?![^\s()=!<>:"'])/
    MINUS.1: /-(?=[A-Za-z(])/
    STAR.1: /\*(?![^\s()=!<>:"'])/
    TRUE: "true"
    FALSE: "false"
    NULL: "null"
    WORD: /[^\s()=!<>:"']+/
    %ignore /\s+/
    """,
    parser="lalr",
    lexer="basic",
)

_NESTING = ("LPAR", "NOT", "MINUS")
_KEYWORDS = {keyword.lower(): keyword for keyword in ("AND", "OR", "NOT", "true", "false", "null")}

# The error asks for the first of these terminals that the parser would accept.
_EXPECTED = {
    "WORD": 'a field, NOT or "("',
    "OPERATOR": "an operator (= != < <= > >= :)",
    "STRING": "a value (string, integer, true, false, null)",
    "RPAR": 'AND, OR or ")"',
    "$END": "AND, OR or the end of the filter",
}
# As word processors and chats write them.
_TYPOGRAPHIC_QUOTES = tuple(map(chr, (0xAB, 0xBB, 0x2039, 0x203A, *range(0x2018, 0x2020))))
_FOUND = {
    "STRING": "a string",
    "INTEGER": "an integer",
    "DECIMAL": "a number with a fraction or an exponent",
    "WORD": "an unquoted word",
    "$END": "the end of the filter",
}


async def _parse(text: str, time_slice: TimeSlice) -> Tree[Token]:
    parser = _PARSER.parse_interactive(text)
    try:
        for token in parser.iter_parse():
            _check(token, parser)
            await time_slice.pause()
        tree: Tree[Token] = parser.feed_token(Token("$END", "", len(text)))
    except UnexpectedCharacters as error:
        reason = "expected !=" if error.char == "!" else "this string has no closing quote"
        raise _error(error.pos_in_stream, reason) from None
    except UnexpectedToken as error:
        accepted = parser.accepts()  # type: ignore[no-untyped-call]  # lark leaves it untyped
        raise _unexpected(error.token, accepted, text) from None
    return tree


def _check(token: Token, parser: InteractiveParser) -> None:
    """Check what the grammar can't express: the depth of nesting, and keywords in the wrong case."""
    if token.type == "WORD" and token.lower() in _KEYWORDS:
        raise _error(token.start_pos, f"keywords are case-sensitive: write {_KEYWORDS[token.lower()]}")
    stack = parser.parser_state.value_stack
    depth = sum(isinstance(item, Token) and item.type in _NESTING for item in [*stack, token])
    if depth > MAX_DEPTH:
        raise _error(token.start_pos, f"parentheses and NOT are nested more than {MAX_DEPTH} deep")


def _unexpected(token: Token, accepted: Collection[str], text: str) -> InvalidFilter:
    expected = next(text for terminal, text in _EXPECTED.items() if terminal in accepted)
    message = f"expected {expected} but found {_found(token)}{_advice(token, accepted, text)}"
    return _error(token.start_pos, message)


def _advice(token: Token, accepted: Collection[str], text: str) -> str:
    """Return how to write a value that the parser did not accept."""
    if "STRING" in accepted and token.startswith(_TYPOGRAPHIC_QUOTES):
        return "; put strings and times in straight quotes"
    if "STRING" in accepted and token.type in {"WORD", "MINUS"}:
        return "; put strings and times in quotes"
    follows_string = text[: token.start_pos].endswith(("'", '"'))
    if "STRING" not in accepted and token.type == "STRING" and follows_string:
        return f"; write a quote inside a string as \\{token[0]}"
    return ""


def _found(token: Token) -> str:
    return _FOUND.get(token.type, f'"{token}"')


def _error(start: int | None, message: str) -> InvalidFilter:
    position = (start or 0) + 1
    return InvalidFilter(f"at character {position}: {message}", field="filter", position=position)


_COMBINED: Mapping[str, Callable[..., ColumnElement[bool]]] = {
    "conjunction": and_,
    "disjunction": or_,
    "negation": not_,
}


class _Fields(NamedTuple):
    """The fields of a filter: their columns, and how their texts are normalised."""

    columns: Columns
    normalise: Mapping[str, Callable[[str], str]]
    spellings: Mapping[str, Callable[[str], Sequence[str]]]


async def _expression(tree: Any, fields: _Fields, time_slice: TimeSlice) -> ColumnElement[bool]:
    if tree.data == "comparison":
        await time_slice.pause()
        return _comparison(fields, *tree.children)
    children = [child for child in tree.children if isinstance(child, Tree)]
    parts = [await _expression(child, fields, time_slice) for child in children]
    return _COMBINED[tree.data](*parts)


def _comparison(fields: _Fields, field: Token, compared: Token, value: Token) -> ColumnElement[bool]:
    if field not in fields.columns:
        message = f"unknown field {json.dumps(field[:40])[:42]}; the fields are {', '.join(fields.columns)}"
        raise _error(field.start_pos, message)
    column = fields.columns[field]
    if value.type == "STAR":
        return _presence(column, field, compared, value)
    kind = next(kind for type_, kind in _KINDS.items() if isinstance(column.type, type_))
    if compared not in kind.operators:
        raise _error(compared.start_pos, f"{field} is {kind.name} and takes {' '.join(kind.operators)}")
    if value.type == "NULL":
        return _null(column, field, compared, value)
    if value.type not in kind.tokens:
        advice = f"; {kind.name} has no quotes" if value.type == "STRING" else ""
        message = f"{field} is {kind.name}: expected {kind.value} but found {_found(value)}{advice}"
        raise _error(value.start_pos, message)
    return kind.compare(_Comparison(fields, column, field, compared, value))


class _Comparison(NamedTuple):
    """One comparison of a filter: a column, an operator, and a value of the right type."""

    fields: _Fields
    column: Expression
    field: str
    operator: str
    value: Token


def _presence(column: Expression, field: Token, compared: Token, value: Token) -> ColumnElement[bool]:
    if compared != ":":
        message = f"* without quotes follows a colon, as in {field}:*, which is true if {field} is not null"
        raise _error(value.start_pos, message)
    return column.is_not(None)


def _null(column: Expression, field: Token, compared: Token, value: Token) -> ColumnElement[bool]:
    if compared not in _EQUAL:
        raise _error(compared.start_pos, "null can be compared with = and != only")
    if not getattr(column, "nullable", True):
        raise _error(value.start_pos, f"{field} is never null")
    return column.is_(None) if compared == "=" else column.is_not(None)


def _compare_integer(comparison: _Comparison) -> ColumnElement[bool]:
    token = comparison.value
    number = int(token.partition(".")[0])
    if not -(2**63) <= number < 2**63:
        raise _error(token.start_pos, "an integer has 64 bits: -9223372036854775808 to 9223372036854775807")
    return compare(comparison.column, comparison.operator, number, BigInteger())


def _compare_boolean(comparison: _Comparison) -> ColumnElement[bool]:
    return compare(comparison.column, comparison.operator, comparison.value == "true", Boolean())


def _compare_text(comparison: _Comparison) -> ColumnElement[bool]:
    match comparison.operator:
        case "=":
            return _matches(comparison)
        case "!=":
            return not_(_matches(comparison))
        case ":":
            return _contains(comparison)
    text = _normalise(comparison, _text(comparison.value))
    return compare(comparison.column, comparison.operator, text, String())


def _matches(comparison: _Comparison) -> ColumnElement[bool]:
    pattern = _pattern(comparison.value)
    if pattern.is_open_left or pattern.is_open_right:
        pattern = pattern._replace(text=_normalise(comparison, pattern.text))
        return matches(comparison.column, pattern)
    spellings = comparison.fields.spellings.get(comparison.field)
    if spellings is None:
        texts: Sequence[str] = [_normalise(comparison, pattern.text)]
    else:
        texts = spellings(pattern.text)
    return or_(*(matches(comparison.column, Pattern(text)) for text in texts))


def _contains(comparison: _Comparison) -> ColumnElement[bool]:
    if comparison.value[1:-1] == "*":
        return comparison.column.is_not(None)
    # A part may stand anywhere in a text: a wildcard at either end of it changes nothing.
    part = _pattern(comparison.value).text
    return contains(comparison.column, _normalise(comparison, part))


def _normalise(comparison: _Comparison, text: str) -> str:
    normalise = comparison.fields.normalise.get(comparison.field)
    return normalise(text) if normalise else text


_SPECIAL = re.compile(r"\\.|\0", re.DOTALL)
_ESCAPES = ('\\"', "\\'", "\\\\", "\\*")
# A backslash always has a character after it, so that an escaped star is never the last group.
_WILDCARDS = re.compile(r"(\*?)((?:\\.|[^\\])*?)(\*?)", re.DOTALL)


def _text(token: Token) -> str:
    """Return the text of a string in which a star is only a star."""
    _check_string(token)
    return _unescape(token[1:-1])


def _pattern(token: Token) -> Pattern:
    """Return the pattern of a string: a star at either end is a wildcard if it is not escaped."""
    _check_string(token)
    found = _WILDCARDS.fullmatch(token, 1, len(token) - 1)
    left, text, right = found.groups() if found else ("", "", "")
    return Pattern(_unescape(text), bool(left), bool(right))


def _check_string(token: Token) -> None:
    for special in _SPECIAL.finditer(token):
        if special[0] not in _ESCAPES:
            start = (token.start_pos or 0) + special.start()
            raise _error(start, f"a string has no NUL, and a backslash only in {' '.join(_ESCAPES)}")


def _unescape(text: str) -> str:
    return _SPECIAL.sub(lambda escape: escape[0][1], text)


_RFC_3339 = re.compile(
    r"(?P<minute>\d{4}-\d\d-\d\dT([01]\d|2[0-3]):\d\d):(?P<second>\d\d)(\.(?P<fraction>\d+))?"
    r"(?P<zone>Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    re.ASCII | re.IGNORECASE,
)
_SECOND = timedelta(seconds=1)


def _compare_time(comparison: _Comparison) -> ColumnElement[bool]:
    return compare_time(comparison.column, comparison.operator, _instant(comparison.value))


def _instant(token: Token) -> Instant:
    written = _RFC_3339.fullmatch(_text(token))
    if not written:
        message = 'expected an RFC 3339 time with Z or an offset (+02:00), as in "2024-01-31T09:30:00Z"'
        raise _error(token.start_pos, message)
    fraction = written["fraction"] or ""
    microseconds, rest = fraction[:6].ljust(6, "0"), fraction[6:]
    try:
        time = _time(written["minute"], written["second"], microseconds, written["zone"])
    except (ValueError, OverflowError):
        message = "no such time: check the date and the time of day; in UTC the year is 1 to 9999"
        raise _error(token.start_pos, message) from None
    return Instant(time, is_between=bool(rest.strip("0")))


def _time(minute: str, second: str, microseconds: str, zone: str) -> datetime:
    """Return a time in UTC; raises ValueError and OverflowError if there is none.

    A leap second is the first second after it, as in PostgreSQL. It ends a month.
    """
    is_leap = second == "60"
    written = f"{minute}:{'59' if is_leap else second}.{microseconds}{zone}"
    time = datetime.fromisoformat(written.upper()).astimezone(UTC)
    if not is_leap:
        return time
    following = time + _SECOND
    if (following.day, following.hour, following.minute, following.second) != (1, 0, 0, 0):
        raise ValueError(written)
    return following


class _Kind(NamedTuple):
    """The operators and values that fields of one type allow."""

    name: str
    operators: tuple[str, ...]
    value: str
    tokens: tuple[str, ...]
    compare: Callable[[_Comparison], ColumnElement[bool]]


_EQUAL = ("=", "!=")
_ORDERED = (*_EQUAL, "<", "<=", ">", ">=")
_KINDS = {
    UtcDateTime: _Kind("a time", _ORDERED, "a time in quotes", ("STRING",), _compare_time),
    Boolean: _Kind("a boolean", _EQUAL, "true or false", ("TRUE", "FALSE"), _compare_boolean),
    Integer: _Kind("an integer", _ORDERED, "an integer", ("INTEGER",), _compare_integer),
    String: _Kind("text", (*_ORDERED, ":"), "a string in quotes", ("STRING",), _compare_text),
}
