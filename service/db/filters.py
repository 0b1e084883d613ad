"""Translates the filter and order_by of lists and exports to SQLAlchemy expressions.

The filter language is that of AIP-160 (https://google.aip.dev/160), in which OR binds tighter than AND;
order_by is that of AIP-132. `docs/filtering.md` describes both for callers.
"""

import json
import operator
import re
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

from lark import Lark, Token, Tree, UnexpectedCharacters, UnexpectedToken
from lark.parsers.lalr_interactive_parser import InteractiveParser
from sqlalchemy import BigInteger, Boolean, ColumnElement, Integer, String, and_, literal, not_, or_
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from service.db.base import ColumnType, Expression, UtcDateTime
from service.errors import InvalidFilter, InvalidOrder
from service.timeslice import TimeSlice

MAX_CHARACTERS = 2_000
MAX_DEPTH = 20

Columns = Mapping[str, Expression]


class Order(NamedTuple):
    """The sort order of a list; ids break ties."""

    field: str
    descending: bool


async def condition(
    text: str, columns: Columns, normalise: Mapping[str, Callable[[str], str]] = {}
) -> ColumnElement[bool] | None:
    """Return the filter as an expression over the columns, None if it is blank.

    The type of a column decides which operators and values are allowed. `normalise` maps a field to a
    function that is applied to a text before it is compared. A filter has at most 2,000 characters, nested
    at most 20 deep. Raises InvalidFilter; its fact `position` counts characters from 1.
    """
    if len(text) > MAX_CHARACTERS:
        raise _error(MAX_CHARACTERS, f"a filter has at most {MAX_CHARACTERS:,} characters")
    if not text.strip():
        return None
    time_slice = TimeSlice()
    tree = await _parse(text, time_slice)
    return await _expression(tree, partial(_comparison, columns, normalise), time_slice)


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


class strpos(GenericFunction[int]):  # noqa: N801  (reads as SQL)
    """The position of one text in another, in code points from 1; 0 if it is not there."""

    type = Integer()
    inherit_cache = True


@compiles(strpos, "sqlite")
def _instr(element: strpos, compiler: SQLCompiler, **options: Any) -> str:
    return f"instr({compiler.process(element.clauses, **options)})"


# A word ends only at a space, a bracket, a quote or an operator. So a value that a caller forgot to quote,
# such as foo@example.org, is one word, and the error can point at it.
_PARSER = Lark(
    r"""
    ?start: conjunction
    ?conjunction: disjunction ("AND" disjunction)*
    ?disjunction: term ("OR" term)*
    ?term: comparison
         | "(" conjunction ")"
         | "NOT" term -> negation
    comparison: WORD OPERATOR (STRING | INTEGER | TRUE | FALSE | NULL)

    OPERATOR: /[!<>]=|[=<>:]/
    STRING: /"(\\.|[^"\\])*"|'(\\.|[^'\\])*'/s
    INTEGER.1: /-?[0-9]+(?![^\s()=!<>:"'])/
    TRUE: "true"
    FALSE: "false"
    NULL: "null"
    WORD: /[^\s()=!<>:"']+/
    %ignore /\s+/
    """,
    parser="lalr",
    lexer="basic",
)

_KEYWORDS = {keyword.lower(): keyword for keyword in ("AND", "OR", "NOT", "true", "false", "null")}

# The error asks for the first of these terminals that the parser would accept.
_EXPECTED = {
    "WORD": 'a field, NOT or "("',
    "OPERATOR": "an operator (= != < <= > >= :)",
    "STRING": "a value (string, integer, true, false, null)",
    "RPAR": 'AND, OR or ")"',
    "$END": "AND, OR or the end of the filter",
}
_FOUND = {
    "STRING": "a string",
    "INTEGER": "an integer",
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
        raise _unexpected(error.token, accepted) from None
    return tree


def _check(token: Token, parser: InteractiveParser) -> None:
    """Check what the grammar can't express: the depth of nesting, and keywords in the wrong case."""
    if token.type == "WORD" and token.lower() in _KEYWORDS:
        raise _error(token.start_pos, f"keywords are case-sensitive: write {_KEYWORDS[token.lower()]}")
    stack = parser.parser_state.value_stack
    depth = sum(isinstance(item, Token) and item.type in ("LPAR", "NOT") for item in [*stack, token])
    if depth > MAX_DEPTH:
        raise _error(token.start_pos, f"parentheses and NOT are nested more than {MAX_DEPTH} deep")


def _unexpected(token: Token, accepted: Collection[str]) -> InvalidFilter:
    expected = next(text for terminal, text in _EXPECTED.items() if terminal in accepted)
    advice = "; put strings and times in quotes" if "STRING" in accepted and token.type == "WORD" else ""
    return _error(token.start_pos, f"expected {expected} but found {_found(token)}{advice}")


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
_OPERATORS: Mapping[str, Callable[..., ColumnElement[bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    ":": lambda column, text: strpos(column, text) > 0,
}


async def _expression(
    tree: Any, comparison: Callable[..., ColumnElement[bool]], time_slice: TimeSlice
) -> ColumnElement[bool]:
    if tree.data == "comparison":
        await time_slice.pause()
        return comparison(*tree.children)
    parts = [await _expression(child, comparison, time_slice) for child in tree.children]
    return _COMBINED[tree.data](*parts)


def _comparison(
    columns: Columns,
    normalise: Mapping[str, Callable[[str], str]],
    field: Token,
    compared: Token,
    value: Token,
) -> ColumnElement[bool]:
    if field not in columns:
        message = f"unknown field {json.dumps(field[:40])[:42]}; the fields are {', '.join(columns)}"
        raise _error(field.start_pos, message)
    column = columns[field]
    kind = next(kind for type_, kind in _KINDS.items() if isinstance(column.type, type_))
    if compared not in kind.operators:
        raise _error(compared.start_pos, f"{field} is {kind.name} and takes {' '.join(kind.operators)}")
    if value.type == "NULL":
        return _null(column, field, compared, value)
    if value.type not in kind.tokens:
        message = f"{field} is {kind.name}: expected {kind.value} but found {_found(value)}"
        raise _error(value.start_pos, message)
    operand = kind.read(value)
    if field in normalise:
        operand = normalise[field](operand)
    return _OPERATORS[compared](column, literal(operand, kind.type))


def _null(column: Expression, field: Token, compared: Token, value: Token) -> ColumnElement[bool]:
    if compared not in _EQUAL:
        raise _error(compared.start_pos, "null can be compared with = and != only")
    if not getattr(column, "nullable", True):
        raise _error(value.start_pos, f"{field} is never null")
    return column.is_(None) if compared == "=" else column.is_not(None)


def _integer(token: Token) -> int:
    number = int(token)
    if not -(2**63) <= number < 2**63:
        raise _error(token.start_pos, "an integer has 64 bits: -9223372036854775808 to 9223372036854775807")
    return number


_SPECIAL = re.compile(r"\\.|\0", re.DOTALL)
_ESCAPES = ('\\"', "\\'", "\\\\")


def _text(token: Token) -> str:
    for special in _SPECIAL.finditer(token):
        if special[0] not in _ESCAPES:
            start = (token.start_pos or 0) + special.start()
            raise _error(start, f"a string has no NUL, and a backslash only in {' '.join(_ESCAPES)}")
    return _SPECIAL.sub(lambda escape: escape[0][1], token[1:-1])


_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\dT([01]\d|2[0-3]):\d\d:\d\d(\.\d+)?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)",
    re.ASCII | re.IGNORECASE,
)


def _time(token: Token) -> datetime:
    text = _text(token)
    written = _RFC_3339.fullmatch(text)
    if not written:
        message = 'expected an RFC 3339 time with Z or an offset (+02:00), as in "2024-01-31T09:30:00Z"'
        raise _error(token.start_pos, message)
    if len(written[2] or "") > len(".123456"):
        raise _error(token.start_pos, "a time is exact to the microsecond: at most 6 digits follow the point")
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        message = "no such time: check the date and the time of day; in UTC the year is 1 to 9999"
        raise _error(token.start_pos, message) from None


class _Kind(NamedTuple):
    """The operators and values that fields of one type allow."""

    name: str
    operators: tuple[str, ...]
    value: str
    tokens: tuple[str, ...]
    read: Callable[[Token], Any]
    type: ColumnType


_EQUAL = ("=", "!=")
_ORDERED = (*_EQUAL, "<", "<=", ">", ">=")
_KINDS = {
    UtcDateTime: _Kind("a time", _ORDERED, "a time in quotes", ("STRING",), _time, UtcDateTime()),
    Boolean: _Kind("a boolean", _EQUAL, "true or false", ("TRUE", "FALSE"), json.loads, Boolean()),
    Integer: _Kind("an integer", _ORDERED, "an integer", ("INTEGER",), _integer, BigInteger()),
    String: _Kind("text", (*_ORDERED, ":"), "a string in quotes", ("STRING",), _text, String()),
}
