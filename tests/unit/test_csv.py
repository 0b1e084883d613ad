"""CSV as spreadsheets and databases write it."""

from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from roster.v1.bulk_pb2 import RowFailure
from roster.v1.resources_pb2 import User
from service.cli.formats import Csv, SourceError
from service.cli.formats.write import csv_line
from service.cli.rows import Row
from tests.support.files import columns_of, rows_of, shown

FAILURE = RowFailure(reason="EMAIL_TAKEN", field="email", message="email belongs to another user")
ADA = "email='ada@example.org' full_name='Ada'"
ALAN = "email='alan@example.org' full_name='Alan'"


def csv_rows(data: bytes | str, **options: str) -> list[Row[Any]]:
    """Return the rows of CSV."""
    return rows_of(Csv(columns_of(), **options), data.encode() if isinstance(data, str) else data)


LINES = ["email,full_name", "ada@example.org,Ada", "alan@example.org,Alan"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_reads_any_line_end(end: str, last: bool) -> None:
    """Unix, Windows and old Mac; the last line may have none."""
    rows = csv_rows(end.join(LINES) + end * last)

    assert shown(rows) == [ADA, ALAN]
    assert [row.number for row in rows] == [2, 3]


def test_reads_mixed_line_ends() -> None:
    """Files that were put together from several have more than one."""
    assert shown(csv_rows("email,full_name\rada@example.org,Ada\r\nalan@example.org,Alan\n")) == [ADA, ALAN]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_finds_delimiter_and_encoding(delimiter: str, encoding: str) -> None:
    """Excel writes `;` where the comma is the decimal separator, and UTF-16 with tabs as “Unicode Text”."""
    text = "\r\n".join(LINES).replace(",", delimiter) + "\r\n"

    assert shown(csv_rows(text.encode(encoding))) == [ADA, ALAN]


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("email,a;b\nada@example.org,Ada;x\n", {"delimiter": ","}),
        ("sep=;\r\nemail;full_name\r\nada@example.org;Ada\r\n", {}),
        ("\n\r\n  \nemail,full_name\nada@example.org,Ada\n", {}),
        ("email\tfull_name\r\nada@example.org\tAda".encode("utf-16-be"), {"encoding": "utf-16-be"}),
    ],
)
def test_reads_other_beginnings(data: bytes | str, options: dict[str, str]) -> None:
    """A given delimiter, Excel's `sep=`, blank lines before the header, an encoding without a mark."""
    [row] = csv_rows(data, **options)

    assert isinstance(row.message, User)
    assert row.message.email == "ada@example.org"


def test_reads_the_ansi_files_of_excel() -> None:
    """They need --encoding: without it, each row with an umlaut says so."""
    data = "email;full_name\r\nada@example.org;Jürgen\r\nalan@example.org;Alan\r\n".encode("cp1252")

    bad, good = csv_rows(data)
    first, _ = csv_rows(data, encoding="cp1252")

    assert bad.failure is not None
    assert "--encoding cp1252" in bad.failure.message
    assert shown([good]) == [ALAN]
    assert shown([first]) == ["email='ada@example.org' full_name='Jürgen'"]


QUOTES = [
    ('ada@example.org,Ada 5" Lovelace', 'Ada 5" Lovelace'),
    ('ada@example.org,Ada "Countess" Lovelace', 'Ada "Countess" Lovelace'),
    ('ada@example.org,5""', '5""'),
    ('ada@example.org,"Ada ""Countess"" L"', 'Ada "Countess" L'),
    ('ada@example.org,"Ada, Countess"', "Ada, Countess"),
    ('ada@example.org, "Ada"', "Ada"),
    ('ada@example.org,  "Ada, Countess"', "Ada, Countess"),
    ('ada@example.org, "Ada\n ""x"""', 'Ada\n "x"'),
    ('"ada@example.org","Ada\r\nLovelace"', "Ada\r\nLovelace"),
    ("ada@example.org, Ada", " Ada"),
    ("ada@example.org,Ada ", "Ada "),
    ("ada@example.org,'Ada'", "'Ada'"),
    ("ada@example.org,Ada\\", "Ada\\"),
    ("ada@example.org,=1+1", "=1+1"),
    ("ada@example.org,\u2028Ada\x0b\x85", "\u2028Ada\x0b\x85"),
]


@pytest.mark.parametrize(("line", "name"), QUOTES)
def test_alters_no_cell(line: str, name: str) -> None:
    """A quote inside an unquoted cell is a character; spaces before a quote are not a part of the cell."""
    first, second = csv_rows(f"email,full_name\n{line}\nalan@example.org,Alan\n")

    assert first.message == User(email="ada@example.org", full_name=name)
    assert shown([second]) == [ALAN]


def test_skips_spaces_after_delimiters_if_the_header_has_them() -> None:
    """They are the layout of the file."""
    rows = csv_rows('email, full_name, is_active\nada@example.org, Ada, t\nalan@example.org, "Alan", f\n')

    assert shown(rows) == [f"{ADA} is_active=True", f"{ALAN} is_active=False"]


BAD_QUOTES = [
    '"Al" Smith',
    '"Al" "Smith"',
    '"Al" ',
    '"Al\n"Smith',
    '"Al',
    '"Al""',
]


@pytest.mark.parametrize("cell", BAD_QUOTES)
def test_a_misplaced_quote_fails_its_line(cell: str) -> None:
    """The rows around it are loaded, and the reject has the line as it was."""
    csv_format = Csv(columns_of())
    data = f"email,full_name\nada@example.org,Ada\nbad@example.org,{cell}\nalan@example.org,Alan\n"

    rows = rows_of(csv_format, data.encode())

    failed = [row for row in rows if row.failure]
    assert shown([row for row in rows if not row.failure]) == [ADA, ALAN]
    assert failed[0].number == 3
    assert failed[0].failure is not None
    assert failed[0].failure.reason == "MALFORMED_MESSAGE"
    line = f"bad@example.org,{cell}".splitlines()[0]
    assert csv_format.reject(failed[0], FAILURE).endswith(b',"' + line.replace('"', '""').encode() + b'"\n')


def test_ignores_blank_rows_and_unnamed_columns() -> None:
    """Excel writes delimiters for cells that were once filled."""
    rows = csv_rows(
        "email,full_name,,\r\nada@example.org,Ada,,\r\n,,,\r\n\r\nalan@example.org,Alan,,,,\r\n , ,,\r\n"
    )

    assert shown(rows) == [ADA, ALAN]
    assert [row.number for row in rows] == [2, 5]


@pytest.mark.parametrize("line", ["ada@example.org", "ada@example.org,Ada,x", "ada@example.org,Ada,,x"])
def test_a_row_with_missing_or_further_cells_fails(line: str) -> None:
    """A cell that has no column is never dropped."""
    [row] = csv_rows(f"email,full_name\n{line}\n")

    assert row.failure is not None
    assert "cell" in row.failure.message


def test_a_file_without_rows_has_none() -> None:
    """The command warns; the reader does not invent a row."""
    assert csv_rows("email,full_name\r\n") == []


def test_reads_a_header_of_several_lines() -> None:
    """A cell of a spreadsheet can contain a line break."""
    [row] = csv_rows('"Full\nName";"E-Mail"\nAda;ada@example.org\n')

    assert shown([row]) == [ADA]
    assert row.number == 3


def test_rejects_keep_the_cells() -> None:
    """With another delimiter and encoding than the rejects have, and unset cells apart from empty ones."""
    csv_format = Csv(columns_of())
    rows = rows_of(csv_format, 'email;full_name;x\na;;"b;""c"\nb;"";", "\n'.encode("utf-16"))

    assert [csv_format.reject(row, FAILURE).partition(b"user,")[2] for row in rows] == [
        b'a,,"b;""c"\n',
        b'b,"",", "\n',
    ]
    assert csv_format.rejects_header() == b"_error,email,full_name,x\n"


cells = st.text(st.sampled_from('a",; \n\r\t|\0é'), max_size=6)
optional_cells = st.none() | cells


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.lists(st.tuples(cells.filter(str.strip), optional_cells, optional_cells), min_size=1, max_size=4))
@example([("a", 'b,"",c', None)])
@example([("a", ",", "")])
@example([('""', None, '",""')])
def test_reads_back_any_cell(rows: list[tuple[str, str | None, str | None]]) -> None:
    """An unset cell and an empty one stay different, whatever the other cells contain."""
    names = ["email", "full_name", "hashed_password"]
    data = csv_line(names) + b"".join(map(csv_line, rows))

    messages = [row.message for row in csv_rows(data)]

    # hashed_password has no presence: unset and empty are the same.
    assert messages == [User(email=row[0], full_name=row[1], hashed_password=row[2] or "") for row in rows]


@settings(max_examples=500, derandomize=True, deadline=None)
@given(st.text(st.sampled_from('a@x,"; \n\r\t'), max_size=60))
@example('a,"')
@example('"a"b,c\n"')
def test_accounts_for_all_text_of_any_file(text: str) -> None:
    """Each character of a file is in a row, in a reject, or in a blank line."""
    try:
        rows = csv_rows("email,full_name\n" + text, delimiter=",")
    except SourceError:
        return

    kept = "".join(row.original[0] for row in rows)
    assert kept.strip(", \t\r\n").replace("\r", "").count("a") == text.count("a")
    for row in rows:
        assert (row.message is None) != (row.failure is None)
