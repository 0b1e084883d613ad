import re
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from sqlalchemy import Dialect, make_url

from roster.errors import InvalidFilter, InvalidOrder
from service.db import filters
from service.db.filters import Columns, Order, parse_order
from service.posts.repository import PostRepository
from service.users.repository import UserRepository
from tests.support.filter_model import Node, user_filters, write_filter

COLUMNS, POST_COLUMNS = UserRepository.filterable, PostRepository.filterable
POSTGRESQL = make_url("postgresql+asyncpg://").get_dialect()()
SQLITE = make_url("sqlite+aiosqlite://").get_dialect()()
FIELDS = ("id", "email", "created_at")
DOCUMENTATION = Path(__file__).parents[2] / "docs/filtering.md"


def condition(text: str, columns: Columns, normalise: Any = MappingProxyType({})) -> Any:
    """Run the coroutine, which only waits for its turn."""
    running = filters.condition(text, columns, normalise)
    while True:
        try:
            running.send(None)
        except StopIteration as end:
            return end.value


def compiled(text: str, dialect: Dialect) -> tuple[str, list[Any]]:
    expression = condition(text, COLUMNS)
    assert expression is not None
    statement = expression.compile(dialect=dialect)
    sql = str(statement).replace("users.", "").replace(" WITH TIME ZONE", "TZ")
    return sql, [statement.params[name] for name in statement.positiontup or ()]


def rejected(text: str) -> InvalidFilter:
    with pytest.raises(InvalidFilter) as caught:
        condition(text, COLUMNS)
    return caught.value


NOON = datetime(2024, 1, 1, 12, tzinfo=UTC)

GOOD = [
    ("id = 7", "id = $1::BIGINT", "id = ?", [7]),
    ("id!=-9223372036854775808", "id != $1::BIGINT", "id != ?", [-(2**63)]),
    ("id <= 9223372036854775807", "id <= $1::BIGINT", "id <= ?", [2**63 - 1]),
    ("\n id\t>\n007 ", "id > $1::BIGINT", "id > ?", [7]),
    ('email = "a@b.org"', "email = $1::VARCHAR", "email = ?", ["a@b.org"]),
    ("email >= 'a\"b'", "email >= $1::VARCHAR", "email >= ?", ['a"b']),
    (r'email < "\"\'\\n"', "email < $1::VARCHAR", "email < ?", ["\"'\\n"]),
    ('email = ""', "email = $1::VARCHAR", "email = ?", [""]),
    ('email = "AND (true"', "email = $1::VARCHAR", "email = ?", ["AND (true"]),
    ('email : "@b"', "strpos(email, $1::VARCHAR) > $2::INTEGER", "instr(email, ?) > ?", ["@b", 0]),
    ('NOT email:"@b"', "strpos(email, $1::VARCHAR) <= $2::INTEGER", "instr(email, ?) <= ?", ["@b", 0]),
    ("is_active = true", "is_active = $1::BOOLEAN", "is_active = ?", [True]),
    ("is_active != false", "is_active != $1::BOOLEAN", "is_active != ?", [False]),
    ("id = 7.0 OR id > -3.000", "id = $1::BIGINT OR id > $2::BIGINT", "id = ? OR id > ?", [7, -3]),
    (
        'email = "ada*"',
        "email >= $1::VARCHAR AND email < $2::VARCHAR",
        "email >= ? AND email < ?",
        ["ada", "adb"],
    ),
    (
        'email != "ada*"',
        "NOT (email >= $1::VARCHAR AND email < $2::VARCHAR)",
        "NOT (email >= ? AND email < ?)",
        ["ada", "adb"],
    ),
    ("email='*@b'", "right(email, $1::INTEGER) = $2::VARCHAR", "substr(email, -?) = ?", [2, "@b"]),
    ('email = "*%_*"', "strpos(email, $1::VARCHAR) > $2::INTEGER", "instr(email, ?) > ?", ["%_", 0]),
    (
        'email = "\ud7ff*" OR email = "a\U0010ffff*"',
        "email >= $1::VARCHAR AND email < $2::VARCHAR OR email >= $3::VARCHAR AND email < $4::VARCHAR",
        "email >= ? AND email < ? OR email >= ? AND email < ?",
        ["\ud7ff", "\ue000", "a\U0010ffff", "b"],
    ),
    ("email = '\U0010ffff*'", "email >= $1::VARCHAR", "email >= ?", ["\U0010ffff"]),
    ('email = "*"', "email >= $1::VARCHAR", "email >= ?", [""]),
    ("email != '**'", "email < $1::VARCHAR", "email < ?", [""]),
    ('email = "***"', "strpos(email, $1::VARCHAR) > $2::INTEGER", "instr(email, ?) > ?", ["*", 0]),
    ('email = "a*b"', "email = $1::VARCHAR", "email = ?", ["a*b"]),
    (r'email = "\*a\*"', "email = $1::VARCHAR", "email = ?", ["*a*"]),
    (
        r'email = "\\*"',
        "email >= $1::VARCHAR AND email < $2::VARCHAR",
        "email >= ? AND email < ?",
        ["\\", "]"],
    ),
    ('email >= "*"', "email >= $1::VARCHAR", "email >= ?", ["*"]),
    ('email : "*a*"', "strpos(email, $1::VARCHAR) > $2::INTEGER", "instr(email, ?) > ?", ["a", 0]),
    (r'email : "\*"', "strpos(email, $1::VARCHAR) > $2::INTEGER", "instr(email, ?) > ?", ["*", 0]),
    ("full_name:*", "full_name IS NOT NULL", "full_name IS NOT NULL", []),
    ("full_name : '*'", "full_name IS NOT NULL", "full_name IS NOT NULL", []),
    ("-full_name:*", "full_name IS NULL", "full_name IS NULL", []),
    ("NOT full_name : *", "full_name IS NULL", "full_name IS NULL", []),
    (
        "is_active:* OR id:*",
        "is_active IS NOT NULL OR id IS NOT NULL",
        "is_active IS NOT NULL OR id IS NOT NULL",
        [],
    ),
    ("-(id = 1 OR -id = 2)", "NOT (id = $1::BIGINT OR id != $2::BIGINT)", "NOT (id = ? OR id != ?)", [1, 2]),
    ("full_name = null", "full_name IS NULL", "full_name IS NULL", []),
    ("full_name != null", "full_name IS NOT NULL", "full_name IS NOT NULL", []),
    ("NOT NOT full_name = null", "full_name IS NULL", "full_name IS NULL", []),
    (
        'created_at < "2024-01-01T12:00:00Z"',
        "created_at < $1::TIMESTAMPTZ",
        "created_at < ?",
        [NOON],
    ),
    (
        'created_at = "2024-01-01t14:30:00.0+02:30" OR created_at = "9999-12-31T23:59:59.999999-00:00"',
        "created_at = $1::TIMESTAMPTZ OR created_at = $2::TIMESTAMPTZ",
        "created_at = ? OR created_at = ?",
        [NOON, datetime.max.replace(tzinfo=UTC)],
    ),
    (
        'created_at > "2024-01-01T12:00:00.000000001Z" AND created_at >= "2024-01-01T12:00:00.0000009Z"',
        "created_at > $1::TIMESTAMPTZ AND created_at > $2::TIMESTAMPTZ",
        "created_at > ? AND created_at > ?",
        [NOON, NOON],
    ),
    (
        'created_at < "2024-01-01T12:00:00.000000001z" AND created_at <= "2024-01-01T12:00:00.0000009z"',
        "created_at <= $1::TIMESTAMPTZ AND created_at <= $2::TIMESTAMPTZ",
        "created_at <= ? AND created_at <= ?",
        [NOON, NOON],
    ),
    (
        'created_at < "2024-01-01T12:00:00.000000000000Z"',
        "created_at < $1::TIMESTAMPTZ",
        "created_at < ?",
        [NOON],
    ),
    (
        'created_at > "2016-12-31T23:59:60.5Z" OR created_at > "2016-12-31T15:59:60-08:00"',
        "created_at > $1::TIMESTAMPTZ OR created_at > $2::TIMESTAMPTZ",
        "created_at > ? OR created_at > ?",
        [datetime(2017, 1, 1, 0, 0, 0, 500_000, UTC), datetime(2017, 1, 1, tzinfo=UTC)],
    ),
    (
        "id = 1 OR id = 2 AND id = 3 OR id = 4",
        "(id = $1::BIGINT OR id = $2::BIGINT) AND (id = $3::BIGINT OR id = $4::BIGINT)",
        "(id = ? OR id = ?) AND (id = ? OR id = ?)",
        [1, 2, 3, 4],
    ),
    (
        "(id=1)OR(id=2 AND NOT(id=3 AND id=4))",
        "id = $1::BIGINT OR id = $2::BIGINT AND NOT (id = $3::BIGINT AND id = $4::BIGINT)",
        "id = ? OR id = ? AND NOT (id = ? AND id = ?)",
        [1, 2, 3, 4],
    ),
]


@pytest.mark.parametrize(("text", "postgresql", "embedded", "parameters"), GOOD)
def test_filter_becomes_sql_with_bound_parameters(
    text: str, postgresql: str, embedded: str, parameters: list[Any]
) -> None:
    """In the dialect of each database."""
    assert compiled(text, POSTGRESQL) == (postgresql, parameters)
    assert compiled(text, SQLITE) == (embedded, parameters)


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_blank_filter_is_no_condition(text: str) -> None:
    """All rows match."""
    assert condition(text, COLUMNS) is None


BAD = [
    # words and values
    ("nmae = 7", 1, 'unknown field "nmae"; the fields are id, email, full_name, is_active, created_at'),
    ("\0\x1b = 7", 1, r'unknown field "\u0000\u001b"'),
    ("x" * 60 + " = 7", 1, '"' + "x" * 40 + '"'),
    ("email = foo", 9, "found an unquoted word; put strings and times in quotes"),
    ("email = foo@b.org", 9, "put strings and times in quotes"),
    ("created_at < 2024-01-01T00:00:00Z", 14, "put strings and times in quotes"),
    ("email = 'a", 9, "no closing quote"),
    (r'email = "a\"', 9, "no closing quote"),
    (r'email = "a\nb"', 11, r"a backslash only in \" \' \\"),
    ('email = "a\0b"', 11, "NUL"),
    ("id = 9223372036854775808", 6, "64 bits"),
    ("id = -9223372036854775809", 6, "64 bits"),
    ("id = 7.5", 6, "id is an integer: expected an integer but found a number with a fraction"),
    ("id = -.5", 6, "id is an integer: expected an integer but found a number with a fraction"),
    (
        "id = 7e3",
        6,
        "id is an integer: expected an integer but found a number with a fraction or an exponent",
    ),
    ("id = 7.", 6, "id is an integer: expected an integer but found a number"),
    ("email = 7.5", 9, "email is text: expected a string in quotes but found a number"),
    ("created_at > 1706691600.5", 14, "created_at is a time: expected a time in quotes but found a number"),
    ("id = 7.5days", 6, "found an unquoted word"),
    ("id = 7.5.1", 6, "found an unquoted word"),
    ("7.5 = id", 1, 'expected a field, NOT or "(" but found a number'),
    ("id = \u0661", 6, "expected a value"),
    # quotes
    ("email = “ada@b.org”", 9, "put strings and times in straight quotes"),
    ("email : \u2019b.org\u2019", 9, "put strings and times in straight quotes"),
    ("created_at < «2024-01-01T00:00:00Z»", 14, "put strings and times in straight quotes"),
    ("email = 'o''brien@b.org'", 12, r"but found a string; write a quote inside a string as \'"),
    ('full_name = "Scot""t"', 19, r"write a quote inside a string as \""),
    # keywords
    ("id = 1 and id = 2", 8, "write AND"),
    ("Not id = 1", 1, "write NOT"),
    ("is_active = TRUE", 13, "write true"),
    ("full_name = NULL", 13, "write null"),
    # types
    ('id = "7"', 6, "expected an integer but found a string; an integer has no quotes"),
    ("id = '7.5'", 6, "expected an integer but found a string; an integer has no quotes"),
    ('is_active = "true"', 13, "expected true or false but found a string; a boolean has no quotes"),
    ("email = 7", 9, "email is text: expected a string in quotes but found an integer"),
    ("is_active = 1", 13, "is_active is a boolean: expected true or false but found an integer"),
    ("created_at = true", 14, 'created_at is a time: expected a time in quotes but found "true"'),
    ("id : 7", 4, "id is an integer and takes = != < <= > >="),
    ("is_active < true", 11, "is_active is a boolean and takes = !="),
    ('created_at : "2024"', 12, "created_at is a time and takes = != < <= > >="),
    ("email = null", 9, "email is never null"),
    ("full_name : null", 11, "null can be compared with = and != only"),
    # times
    ('created_at < "2024-01-01"', 14, "RFC 3339"),
    ('created_at < "2024-01-01T00:00:00"', 14, "Z or an offset"),
    ('created_at < "2024-01-01 00:00:00Z"', 14, "RFC 3339"),
    ('created_at < "2024-01-01T24:00:00Z"', 14, "RFC 3339"),
    ('created_at < "2024-01-01T00:00:00+01:60"', 14, "RFC 3339"),
    ('created_at < "2024-02-30T00:00:00Z"', 14, "no such time"),
    ('created_at < "2024-01-01T00:00:60Z"', 14, "no such time"),
    ('created_at < "2016-12-30T23:59:60Z"', 14, "no such time"),
    ('created_at < "2016-12-31T23:59:61Z"', 14, "no such time"),
    ('created_at < "9999-12-31T23:59:60Z"', 14, "no such time"),
    ('created_at < "2024-01-01T00:00:00.Z"', 14, "RFC 3339"),
    # stars
    ("full_name = *", 13, "* without quotes follows a colon, as in full_name:*"),
    ("email = ada*", 9, "put strings and times in quotes"),
    ("email : *@b.org", 9, "put strings and times in quotes"),
    ("* = 7", 1, 'expected a field, NOT or "(" but found "*"'),
    ("email = -a", 9, "put strings and times in quotes"),
    ("id : '*'", 4, "id is an integer and takes = != < <= > >="),
    ("- id = 1", 3, "expected an operator"),
    ("-nmae:*", 2, 'unknown field "nmae"'),
    ('created_at < "0000-01-01T00:00:00Z"', 14, "the year is 1 to 9999"),
    ('created_at < "0001-01-01T00:00:00+00:01"', 14, "the year is 1 to 9999"),
    ('created_at < "9999-12-31T23:59:59-00:01"', 14, "the year is 1 to 9999"),
    # grammar
    ("is_active = )", 13, 'expected a value (string, integer, true, false, null) but found ")"'),
    ("id", 3, "expected an operator (= != < <= > >= :) but found the end of the filter"),
    ("id == 7", 5, 'expected a value (string, integer, true, false, null) but found "="'),
    ("id = 1 id = 2", 8, "expected AND, OR or the end of the filter but found an unquoted word"),
    ("(id = 1 (id = 2))", 9, 'expected AND, OR or ")" but found "("'),
    ("(id = 1", 8, 'expected AND, OR or ")" but found the end of the filter'),
    ("id = 1)", 7, 'expected AND, OR or the end of the filter but found ")"'),
    ("id = 1 OR  ", 12, 'expected a field, NOT or "(" but found the end of the filter'),
    ("()", 2, 'expected a field, NOT or "(" but found ")"'),
    ('"a" = email', 1, 'expected a field, NOT or "(" but found a string'),
    ("!id = 1", 1, "expected !="),
    ("id = 1\nAND", 11, "found the end of the filter"),
]


@pytest.mark.parametrize(("text", "position", "fragment"), BAD)
def test_error_points_into_the_filter(text: str, position: int, fragment: str) -> None:
    """It has the position of the character, from 1, and what would be valid there."""
    error = rejected(text)
    assert error.message.startswith(f"at character {position}: ")
    assert fragment in error.message
    assert (error.field, error.facts) == ("filter", {"position": position})


def test_advice_about_quotes_is_for_strings_side_by_side() -> None:
    """Elsewhere an AND is missing."""
    error = rejected("id = 1 'a'")
    assert error.message == "at character 8: expected AND, OR or the end of the filter but found a string"


@pytest.mark.parametrize(
    "text",
    [
        'id = "hunter2"',
        'created_at = "hunter2"',
        r'email = "hunter2\n"',
        "email = 'hunter2",
        "email = hunter2",
        'email = "a" hunter2',
        "email hunter2 'a'",
    ],
)
def test_error_repeats_no_value(text: str) -> None:
    """Values may be personal, and errors end up in logs."""
    assert "hunter2" not in rejected(text).message


@pytest.mark.parametrize(
    "text", ["(" * 20 + "id = 1" + ")" * 20, "NOT " * 20 + "id = 1", "NOT (" * 10 + "id = 1" + ")" * 10]
)
def test_filter_may_be_nested_20_deep(text: str) -> None:
    """Parentheses and NOT both count; an even number of NOTs cancels out."""
    assert compiled(text, SQLITE) == ("id = ?", [1])


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("(" * 2000, 21),
        ("NOT " * 500, 81),
        ("id = 1 AND " + "NOT (" * 10 + "(id = 1" + ")" * 11, 62),
    ],
)
def test_deeper_nesting_is_rejected(text: str, position: int) -> None:
    """The parser stops at the first level too many."""
    error = rejected(text)
    assert error.message == f"at character {position}: parentheses and NOT are nested more than 20 deep"


def test_closed_parentheses_do_not_count() -> None:
    """The limit is on depth, not on number."""
    sql, parameters = compiled(" AND ".join(["NOT (NOT (id = 1))"] * 50), SQLITE)
    assert (sql.count("id = ?"), parameters) == (50, [1] * 50)


def test_filter_has_at_most_2000_characters() -> None:
    """One character more is refused."""
    longest = 'email = "' + "x" * 1990 + '"'
    assert compiled(longest, SQLITE) == ("email = ?", ["x" * 1990])
    error = rejected(longest + " ")
    assert error.message == "at character 2001: a filter has at most 2,000 characters"


@pytest.mark.parametrize("word", ["AND", "OR"])
def test_many_terms_are_one_flat_expression(word: str) -> None:
    """Neither Python nor a database recurses into the terms of a long filter."""
    terms = 200
    sql, parameters = compiled(f" {word} ".join(["id=1"] * terms), SQLITE)
    assert (sql, parameters) == (f" {word} ".join(["id = ?"] * terms), [1] * terms)


def test_values_of_a_field_are_normalised() -> None:
    """E-mails match in any spelling; other fields are compared unchanged."""
    expression = condition('email : "É@B" AND full_name = "É"', COLUMNS, {"email": str.lower})
    assert expression is not None
    statement = expression.compile(dialect=SQLITE)
    assert [statement.params[name] for name in statement.positiontup or ()] == ["é@b", 0, "É"]


TABLE = re.findall(r"^(\| .*`=`.*)$", DOCUMENTATION.read_text(), re.MULTILINE)
OPERATORS = {"=", "!=", "<", "<=", ">", ">=", ":"}


@pytest.mark.parametrize(("column", "columns"), [(0, COLUMNS), (1, POST_COLUMNS)], ids=["users", "posts"])
def test_documented_table_matches_the_filters(column: int, columns: Columns) -> None:
    """It has every field with exactly its operators, and examples of its values."""
    rows = [[set(re.findall(r"`([^`]+)`", cell)) for cell in row.strip("| ").split("|")] for row in TABLE]
    documented = {field: (row[3], row[4]) for row in rows for field in row[column]}
    assert set(documented) == set(columns)

    for field, (operators, values) in documented.items():
        for compared, value in product(operators, values):
            assert condition(f"{field} {compared} {value}", columns) is not None
        for compared, value in product(OPERATORS - operators, values):
            with pytest.raises(InvalidFilter, match=f"{field} is .* and takes"):
                condition(f"{field} {compared} {value}", columns)


_words = "id email full_name nmae = != < : ! ( ) AND OR NOT or null true 7 - 'a' ' \" \\ é \0 \ud800"
_pieces = st.sampled_from([*_words.split(" "), '"2024-01-01T00:00:00Z"', "\n"])


@settings(deadline=None)
@given(st.lists(_pieces, max_size=30).map(" ".join) | st.lists(_pieces, max_size=30).map("".join))
def test_any_text_is_a_filter_or_an_invalid_filter(text: str) -> None:
    """No other exception is raised, and the position is inside the text."""
    try:
        condition(text, COLUMNS)
    except InvalidFilter as error:
        assert 1 <= int(error.facts["position"]) <= len(text) + 1  # noqa: PT017


@settings(deadline=None)
@given(node=user_filters, dialect=st.sampled_from([POSTGRESQL, SQLITE]))
def test_no_value_gets_into_the_sql(node: Node, dialect: Dialect) -> None:
    """It has no quote, and no digit but those of placeholders."""
    sql, _ = compiled(write_filter(node), dialect)
    assert re.fullmatch(r"(?:[a-z_]+|[A-Z]+|\$\d+|[?:(),.=<>! -])*", sql)


@pytest.mark.parametrize(
    ("text", "order"),
    [
        ("", Order("id", descending=False)),
        (" \t", Order("id", descending=False)),
        ("email", Order("email", descending=False)),
        ("email asc", Order("email", descending=False)),
        ("  created_at \t desc\n", Order("created_at", descending=True)),
        ("id desc", Order("id", descending=True)),
    ],
)
def test_order_is_a_field_and_a_direction(text: str, order: Order) -> None:
    """The defaults are the id, ascending."""
    assert parse_order(text, FIELDS) == order


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("full_name", 1),
        (" desc", 2),
        ("email, id", 1),
        ("email,", 1),
        ("email desc,", 7),
        ("email DESC", 7),
        ("email desc id", 12),
        ("email asc desc", 11),
        ("-email", 1),
    ],
)
def test_any_other_order_is_rejected(text: str, position: int) -> None:
    """The error points at the first wrong word, and lists the fields."""
    with pytest.raises(InvalidOrder) as caught:
        parse_order(text, FIELDS)
    assert caught.value.message == (
        f"at character {position}: expected one field (id, email, created_at), then asc, desc or nothing; "
        "ties are always broken by id"
    )
    assert (caught.value.field, caught.value.facts) == ("order_by", {"position": position})
