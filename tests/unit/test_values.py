"""Values of cells, as the programs that write files spell them."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from roster.errors import InvalidField
from service.cli.values import boolean, integer, text, timestamp

# PostgreSQL's documentation of the type boolean lists the words, and says that unique prefixes are accepted.
TRUE_WORDS = ["t", "tr", "tru", "true", "y", "ye", "yes", "on", "1", "TRUE", "T", "On", " yes ", "on\n"]
FALSE_WORDS = ["f", "fa", "fals", "false", "n", "no", "of", "off", "0", "FALSE", "F", "\tno"]
TRUE = [*TRUE_WORDS, True, 1, 1.0, Decimal(1), b"t"]
FALSE = [*FALSE_WORDS, False, 0, 0.0, Decimal(0), b"f"]
NO_BOOLEAN = ["o", "", "maybe", "2", "-1", "truex", "wahr", "1.5", 2, 0.5, -1, None, [], {}, "\uff54"]


@pytest.mark.parametrize(("value", "expected"), [*((v, True) for v in TRUE), *((v, False) for v in FALSE)])
def test_reads_booleans_as_postgresql_does(value: Any, expected: bool) -> None:
    """Psql writes t and f, pandas 1.0, MySQL 1, spreadsheets TRUE."""
    assert boolean("is_active", value) is expected


@pytest.mark.parametrize("value", NO_BOOLEAN)
def test_refuses_other_booleans(value: Any) -> None:
    """A prefix of two words is none."""
    with pytest.raises(InvalidField, match="is_active must be true or false"):
        boolean("is_active", value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        ("7", 7),
        ("+7", 7),
        (" 7 ", 7),
        ("007", 7),
        ("7.0", 7),
        ("7.", 7),
        ("7.000000000", 7),
        (7.0, 7),
        (-7.0, -7),
        (Decimal(7), 7),
        (Decimal("7.00"), 7),
        (Decimal("7E+2"), 700),
        (b"7", 7),
        ("9223372036854775807", (1 << 63) - 1),
        (float((1 << 53) - 1), (1 << 53) - 1),
    ],
)
def test_reads_whole_numbers(value: Any, expected: int) -> None:
    """Pandas writes ids of a column with gaps as 7.0, Snowflake as decimals of scale 0."""
    assert integer("id", value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "7.5", 7.5, Decimal("7.5"), "7e2", "1.23457E+12", "1,000", "1_000", "0x7", "", "-", ".0", "\u0667",
        True, None, float("nan"), float("inf"), Decimal("NaN"), Decimal("Infinity"), 1e300, float(1 << 53),
        1 << 63, "9223372036854775808", "1" * 5000, b"\xff", [7],
    ],
)  # fmt: skip
def test_refuses_numbers_that_are_not_exact(value: Any) -> None:
    """Large ids that went through a float or a spreadsheet have lost digits."""
    with pytest.raises(InvalidField, match="id must be an integer of at most 64 bits"):
        integer("id", value)


HALF_PAST_NINE = datetime(2024, 1, 31, 9, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        "2024-01-31T09:30:00Z",
        "2024-01-31t09:30:00z",
        "2024-01-31 09:30:00 UTC",
        "2024-01-31 09:30:00.000000 UTC",
        "2024-01-31 09:30:00+00",
        "2024-01-31 09:30:00 +0000",
        "2024-01-31 10:30:00 +01:00",
        "2024-01-31 08:30:00-01",
        "2024-01-31T09:30:00.000000000Z",
        "2024-01-31T09:30:00.0000001234567Z",
        "2024-01-31 09:30:00,000+00:00",
        "2024-01-31 09:30Z",
        "20240131T093000Z",
        " 2024-01-31T09:30:00GMT ",
        b"2024-01-31T09:30:00Z",
        HALF_PAST_NINE,
    ],
)
def test_reads_times_with_a_time_zone(value: Any) -> None:
    """RFC 3339, ISO 8601, BigQuery, psql and pandas; digits after the microsecond are cut off."""
    assert timestamp("created_at", value) == HALF_PAST_NINE


@pytest.mark.parametrize("digits", ["1", "12", "123456", "1234569", "123456999"])
def test_reads_any_number_of_digits(digits: str) -> None:
    """Not only three and six."""
    expected = HALF_PAST_NINE.replace(microsecond=int(f"{digits:0<6}"[:6]))

    assert timestamp("created_at", f"2024-01-31 09:30:00.{digits} UTC") == expected


@pytest.mark.parametrize(
    "value",
    [
        "2024-01-31 09:30:00", "2024-01-31", "31.01.2024 09:30", "01/31/2024 09:30 UTC", "",
        "2024-13-31T09:30:00Z", "2024-02-30 09:30:00 UTC", "2024-01-31 25:00:00Z",
        "2024-01-31 09:30:00 CET", "1706693400", 1706693400, "0001-01-01T00:00:00+02:00",
        "+12024-01-31T09:30:00Z", HALF_PAST_NINE.replace(tzinfo=None), None,
    ],
)  # fmt: skip
def test_refuses_other_times(value: Any) -> None:
    """Without a time zone, a time is not one moment."""
    with pytest.raises(InvalidField, match="created_at must be a time with a time zone, such as 2024"):
        timestamp("created_at", value)


def test_reads_bytes_as_text() -> None:
    """Spark and Impala write strings to Parquet as bytes."""
    assert text("email", "Jürgen".encode()) == "Jürgen"
    with pytest.raises(InvalidField, match="email must be UTF-8"):
        text("email", b"\xff")
    with pytest.raises(InvalidField, match="half of a surrogate pair"):
        text("email", "a\ud800")
    with pytest.raises(InvalidField, match="email must be a string"):
        text("email", 7)
