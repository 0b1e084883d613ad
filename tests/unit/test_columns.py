"""Names of columns: which field each one is."""

from collections.abc import Sequence
from typing import Any

import click
import pytest

from roster.errors import InvalidField
from roster.v1.resources_pb2 import User
from service.cli import columns
from service.cli.columns import UnknownColumn, parse_columns
from service.cli.formats import Csv, Json, Parquet, SourceError
from tests.support.files import columns_of, rows_of, shown


@pytest.mark.parametrize(
    "name",
    [
        "full_name",
        "FULL_NAME",
        "fullName",
        "FullName",
        "Full Name",
        " full name ",
        "full-name",
        "Full_Name",
        "FULLNAME",
    ],
)
def test_matches_any_case_and_form(name: str) -> None:
    """As spreadsheets, JSON and SQL spell the same name."""
    assert columns_of().fields_of([name]) == ["full_name"]


@pytest.mark.parametrize(
    ("entity", "name", "field"),
    [
        ("users", "E-Mail", "email"),
        ("users", "isActive", "is_active"),
        ("users", "hashedPassword", "hashed_password"),
        ("posts", "Author ID", "author_id"),
        ("posts", "authorEmail", "author_email"),
    ],
)
def test_matches_all_fields(entity: str, name: str, field: str) -> None:
    """A hyphen and a space separate words, like an underscore."""
    assert columns_of(entity).fields_of([name]) == [field]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("emial", "email"),
        ("mail", "email"),
        ("e_mail_address", "email"),
        ("email_address", "email"),
        ("name", "full_name"),
        ("First Name", "full_name"),
        ("fulname", "full_name"),
        ("active", "is_active"),
        ("isactiv", "is_active"),
        ("passwordHash", "hashed_password"),
        ("password_digest", "hashed_password"),
    ],
)
def test_a_near_name_is_refused(name: str, field: str) -> None:
    """The sentence has the two options that answer it."""
    with pytest.raises(UnknownColumn) as refused:
        columns_of().fields_of([name])

    assert refused.value.field == field
    assert f"If it is {field}, add --columns" in refused.value.message
    assert "if not, add --ignore" in refused.value.message


@pytest.mark.parametrize("name", ["inactive", "isInactive", "not_active", "disabled", "status", "Deleted At"])
def test_a_column_that_says_the_opposite_is_not_offered(name: str) -> None:
    """Taken for is_active, it would make inactive users active."""
    with pytest.raises(UnknownColumn, match="write is_active instead, as true or false") as refused:
        columns_of().fields_of(["email", name])

    assert "--columns" not in refused.value.message


def test_reports_all_near_names_at_once() -> None:
    """Two names that are near the same field are probably parts of it."""
    with pytest.raises(UnknownColumn) as refused:
        columns_of().fields_of(["email", "First Name", "Last Name", "Active", "team"])

    assert refused.value.message == (
        'the columns "First Name" and "Last Name" are not known. If one of them is full_name, name it with '
        "--columns; if full_name is made of them, join them in one column; if not, add --ignore 'First Name' "
        "--ignore 'Last Name'. The column \"Active\" is not known. If it is is_active, add --columns "
        "is_active=Active; if not, add --ignore Active"
    )


def test_names_of_the_options_match_in_any_case() -> None:
    """As those of the file do."""
    assert columns_of(mapping={"email": "mail"}).check(["Mail", "x"], "the file") == ["email", None]


@pytest.mark.timeout(20)
def test_many_and_long_names_take_linear_time() -> None:
    """JSON in which data are used as names; nothing of it is kept."""
    known = columns_of()
    wide = {f"{number:x} some text": 1 for number in range(4000)}
    rows = [{f"{number} {'é' * 500_000}": 1, "email": "a@x"} for number in range(20)]

    known.to_message(wide)
    for row in rows:
        known.to_message(row)

    assert sum(map(len, known.ignored)) < 20_000


@pytest.mark.parametrize(
    "name", ["id", "created_at", "updatedAt", "version", "team", "note", "x", "", "_error", "éà"]
)
def test_other_names_are_ignored(name: str) -> None:
    """Among them the fields of an export that a create does not read."""
    known = columns_of()

    assert known.fields_of(["email", name]) == ["email", None]
    assert list(known.ignored) == ([name] if name not in {"", "_error"} else [])


@pytest.mark.parametrize("name", ["email_verified", "email2_verified_at", "user_active_since"])
def test_a_column_beside_the_known_one_is_ignored(name: str) -> None:
    """A longer name that shares a word is not a misspelt one if the file has the field."""
    present = ["email", "full_name", "is_active", "hashed_password"]

    assert columns_of().fields_of([*present, name]) == [*present, None]


def test_takes_the_columns_of_the_options() -> None:
    """--columns wins over names that match, and --ignore silences a near one."""
    known = columns_of(mapping={"email": "Mail", "full_name": "Display"}, ignore=["name"])

    fields = known.fields_of(["Mail", "Display", "email", "name"])

    assert fields == ["email", "full_name", None, None]


def test_two_columns_of_one_field_are_refused() -> None:
    """Neither value is dropped in silence, in a header and in a row of JSON."""
    with pytest.raises(InvalidField, match='"email" and "E-Mail" are both email'):
        columns_of().fields_of(["email", "full_name", "E-Mail"])
    rows = rows_of(
        Json(columns_of()), b'{"email": "a@x"}\n{"email": "a@x", "Email": "b@x"}\n{"Email": "c@x"}'
    )

    assert [row.failure.field if row.failure else "" for row in rows] == ["", "email", ""]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["email=Mail"], {"email": "Mail"}),
        (["email=Mail,full_name=Full Name"], {"email": "Mail", "full_name": "Full Name"}),
        (['email="Mail, private",full_name="A=B"'], {"email": "Mail, private", "full_name": "A=B"}),
        (["email=Mail", "full_name=Ada's name"], {"email": "Mail", "full_name": "Ada's name"}),
    ],
)
def test_parses_the_option(options: Sequence[str], expected: dict[str, str]) -> None:
    """Pairs are separated by commas; quotes keep a comma in a name."""
    assert parse_columns(options, ["email", "full_name"]) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["email"], "write FIELD=COLUMN"),
        (["email="], "write FIELD=COLUMN"),
        (["=Mail"], "is not one of email, full_name"),
        (["mail=Mail"], "mail is not one of email, full_name"),
        (["email=A,email=B"], "gives email twice"),
        (['email="A'], "a quote is not closed"),
        (["email=A,full_name=A"], "gives the column A twice"),
    ],
)
def test_refuses_a_malformed_option(options: Sequence[str], expected: str) -> None:
    """The error has what was typed."""
    with pytest.raises(click.UsageError, match=expected):
        parse_columns(options, ["email", "full_name"])


def test_a_missing_column_of_the_options_is_refused() -> None:
    """The file may be another one than meant."""
    with pytest.raises(SourceError, match="names Mail, but the header line has email, full_name"):
        rows_of(Csv(columns_of(mapping={"email": "Mail"})), b"email,full_name\na@x,Ada\n")


def test_formats_have_the_same_names(tmp_path: object) -> None:
    """A file becomes the same users in all formats."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"Mail": ["a@x"], "fullName": ["Ada"], "n": [1]}), sink)
    files = {
        Csv: b"Mail,fullName,n\na@x,Ada,1\n",
        Json: b'{"Mail": "a@x", "fullName": "Ada", "n": 1}',
        Parquet: sink.getvalue().to_pybytes(),
    }

    for kind, data in files.items():
        known = columns_of(mapping={"email": "Mail"})
        [row] = rows_of(kind(known), data)
        assert row.message == User(email="a@x", full_name="Ada"), shown([row])
        assert list(known.ignored) == ["n"]


@pytest.mark.parametrize("form", ["header", "row", "near"])
def test_work_grows_with_the_number_of_columns_only(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of surveys and sensors have tens of thousands of columns."""
    compared: list[str] = []

    def count(name: str) -> str:
        compared.append(name)
        return spelling(name)

    spelling = columns._spelling
    monkeypatch.setattr(columns, "_spelling", count)
    known = columns_of()
    names = ["email", *(f"c{number}" for number in range(1000))]

    match form:
        case "header":
            known.fields_of(names)
        case "row":
            known.to_message(dict.fromkeys(names, "a@x"))
        case "near":
            with pytest.raises(UnknownColumn):
                known.fields_of([*names, "full_nmae"])

    # A name that is not known is compared with each field.
    assert len(compared) < 25 * len(names)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name_are_refused_with_possible_advice(kind: str) -> None:
    """No option can name one of them."""
    with pytest.raises(SourceError, match='two columns are named "email"; remove or rename one of them'):
        rows_of(*_with_two_emails(kind))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name_may_be_ignored(kind: str) -> None:
    """Only those of fields matter."""
    assert shown(rows_of(*_with_two_emails(kind, first="x", second="x"))) == ["email='c@x'"]


def _with_two_emails(kind: str, first: str = "email", second: str = "email") -> tuple[Any, bytes]:
    """Return a format and a file with three columns, the first two of these names."""
    names = [first, second, "email"]
    if kind == "csv":
        return Csv(columns_of()), f"{','.join(names)}\na@x,b@x,c@x\n".encode()
    pyarrow: Any = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    arrays = [pyarrow.array([email]) for email in ("a@x", "b@x", "c@x")]
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=names), sink)
    return Parquet(columns_of()), sink.getvalue().to_pybytes()
