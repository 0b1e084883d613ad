"""CSV as spreadsheets and databases write it."""

from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from roster.v1.bulk_pb2 import RowFailure
from roster.v1.resources_pb2 import User
from service.cli.formats import Csv, SourceError, csv_file
from service.cli.formats.write import csv_line
from service.cli.rows import Row
from tests.support.files import columns_of, rows_of, shown

FAILURE = RowFailure(reason="EMAIL_TAKEN", field="email", message="email belongs to another user")
ADA = "email='ada@example.org' full_name='Ada'"
ALAN = "email='alan@example.org' full_name='Alan'"


def csv_rows(data: bytes | str, **options: Any) -> list[Row[Any]]:
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
    assert "--encoding, such as cp1252" in bad.failure.message
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


MARKS = {
    "before a row": "email,full_name\nada@example.org,Ada\n\ufeffalan@example.org,Alan\n",
    "before a name": "full_name,email\nAda,ada@example.org\n\ufeffAlan,alan@example.org\n",
    "before a quote": 'full_name,email\nAda,ada@example.org\n\ufeff"Alan",alan@example.org\n',
    "two at the beginning": "\ufeff\ufeffemail,full_name\nada@example.org,Ada\nalan@example.org,Alan\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("text", MARKS.values(), ids=list(MARKS))
def test_skips_byte_order_marks_before_rows(text: str, encoding: str) -> None:
    """Files that each had one were put together; the mark would become a part of a name, unseen."""
    assert shown(csv_rows(text.encode(encoding))) == [ADA, ALAN]


def test_keeps_a_byte_order_mark_inside_a_cell() -> None:
    """In quotes it is a character of the cell, also at the beginning of a line."""
    [row] = csv_rows('full_name,email\n"\ufeffAda\n\ufeffL",ada@example.org\n')

    assert isinstance(row.message, User)
    assert row.message.full_name == "\ufeffAda\n\ufeffL"


@pytest.mark.parametrize(
    "again", ["email,full_name", "\ufeffemail,full_name", '"email","full_name"', "email, full_name"]
)
def test_a_repeated_header_line_fails_alone(again: str) -> None:
    """The rows of both files are loaded, and the offsets of rows stay what they were."""
    rows = csv_rows(f"email,full_name\nada@example.org,Ada\n{again}\nalan@example.org,Alan\n")

    assert shown(rows) == [ADA, "the row repeats the header line, and can be left out", ALAN]


@pytest.mark.parametrize("again", ["full_name,email", "email,phone", "EMAIL,password", "id,email"])
def test_refuses_a_second_header_line_with_other_columns(again: str) -> None:
    """The rows below it would be loaded with values in the wrong fields."""
    with pytest.raises(SourceError, match="line 3 is a header line with other columns; load the files"):
        csv_rows(f"email,full_name,id\nada@example.org,Ada,\n{again},EMAIL\nalan@example.org,Alan,\n")


def test_values_may_be_names_of_columns() -> None:
    """In texts they are what they are, and so are ids in a file whose columns have numbers as names."""
    [row] = csv_rows("email,full_name\nada@example.org,email\n")
    known = Csv(columns_of(operation="restore"))
    [number] = rows_of(known, b"id,email,7\n7,ada@example.org,x\n")

    assert shown([row, number]) == [
        "email='ada@example.org' full_name='email'",
        "id=7 email='ada@example.org'",
    ]


HEADERS = [
    ('{"email": "a@x"}\n', "the file looks like JSON; add --format ndjson"),
    ('[\n{"email": "a@x"}\n]\n', "the file looks like JSON; add --format ndjson"),
    ("# users of 2024\nemail,full_name\n", "if line 2 is the header, delete the lines above it"),
    ("Users,,\r\n\r\nemail;full_name;;\r\n", "if line 3 is the header, delete the lines above it"),
    ("Users\n" * 25 + "email\n", "the header line has none of the columns email, .*; it has Users;"),
    ('"Users" of 2024\n', "it has no names; name the columns with --columns"),
]


@pytest.mark.parametrize(("text", "expected"), HEADERS)
def test_says_what_is_wrong_with_a_header(text: str, expected: str) -> None:
    """Reports have titles and comments above the header, and JSON is saved under any name."""
    with pytest.raises(SourceError, match=expected):
        csv_rows(text)


OTHER_TOOLS = [
    (r'bad@x,"Ada \"Countess\" L"', "text follows a closing quote"),
    (r"\.", "the row has 1 cell"),
    ("(2 rows)", "the row has 1 cell"),
    ("# the end", "the row has 1 cell"),
    ("\0" * 64, "the row has 1 cell"),
    ("bad@x,Ada,more", "the row has 3 cells"),
]


@pytest.mark.parametrize(("line", "reason"), OTHER_TOOLS)
def test_what_other_tools_write_fails_its_line(line: str, reason: str) -> None:
    """MySQL escapes with backslashes, psql ends with a marker or a count, lost writes leave zeros."""
    rows = csv_rows(f"email,full_name\nada@example.org,Ada\n{line}\nalan@example.org,Alan\n")

    assert shown([rows[0], rows[-1]]) == [ADA, ALAN]
    assert [reason in failed for failed in shown(rows[1:-1])] == [True]


cells = st.text(st.sampled_from('a",; \n\r\t|\0é\ufeff'), max_size=6)
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


@pytest.mark.timeout(30)
def test_misplaced_quotes_take_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that never end a record would each be read to the end of the file."""
    monkeypatch.setattr(csv_file, "MAX_REREAD", 100_000)

    with pytest.raises(SourceError, match=r"too many quotes are misplaced, the last one at line \d"):
        csv_rows('email,full_name\n"x\n' + 'x",y,"\n' * 200_000)


def test_a_record_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one of many short cells."""
    monkeypatch.setattr(csv_file, "MAX_LINE_BYTES", 1000)

    bad, *good = csv_rows('email,full_name\n"x\n' + 'x","y\n' * 300)

    assert bad.failure is not None
    assert bad.failure.reason == "TOO_LARGE"
    assert [row.number for row in good] == list(range(3, 303))


@pytest.mark.timeout(30)
def test_a_row_of_many_quotes_takes_linear_time() -> None:
    """Which cells are quoted is found in one pass."""
    [row] = csv_rows("email,full_name,note\n" + 'a@x,,"' + ',""' * 300_000 + '"\n')

    assert row.message == User(email="a@x")


@pytest.mark.parametrize("encoding", ["cp1252", "mac_roman", "utf-16-le"])
def test_rejects_load_with_the_same_encoding(encoding: str) -> None:
    """They are UTF-8 with a mark, which counts for more than the option."""
    csv_format = Csv(columns_of(), encoding=encoding)
    rows = rows_of(csv_format, "email,full_name\na@x,Jürgen\n".encode(encoding))
    rejects = csv_format.rejects_header() + csv_format.reject(rows[0], FAILURE)

    assert shown(csv_rows(rejects, encoding=encoding)) == ["email='a@x' full_name='Jürgen'"]


@pytest.mark.parametrize("data", ["email\tfull_name\na@x\tC:\\new\n", 'email,full_name\na@x,x\\"y\n'])
def test_rejects_of_escapes_fail_until_they_are_edited(data: str) -> None:
    """Loaded as they are, they must not turn into text."""
    csv_format = Csv(columns_of())
    [row] = rows_of(csv_format, data.encode())
    assert row.failure is not None

    [again] = csv_rows(csv_format.rejects_header() + csv_format.reject(row, row.failure))

    assert again.failure is not None
