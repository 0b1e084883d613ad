"""CSV in which programs write a word for null, escape with a backslash, or add lines of their own."""

import pytest

from roster.v1.bulk_pb2 import RowFailure
from roster.v1.resources_pb2 import Post, User
from service.cli.columns import UnknownColumn
from service.cli.formats import Csv, SourceError
from service.cli.formats.write import csv_line, csv_lines
from service.cli.values import NULL_WORDS
from tests.support.files import columns_of, rows_of

FAILURE = RowFailure(reason="EMAIL_TAKEN", field="email", message="email belongs to another user")


@pytest.mark.parametrize("word", sorted(NULL_WORDS))
def test_a_word_for_null_fails_its_row(word: str) -> None:
    """It could be a name; the sentence says how to load it as either."""
    [row] = rows_of(Csv(columns_of()), f"email,full_name\na@x,{word}\n".encode())

    assert row.failure is not None
    assert row.failure.field == "full_name"
    assert f"full_name contains {word}. If it means no value, add --null " in row.failure.message


@pytest.mark.parametrize("word", sorted(NULL_WORDS))
@pytest.mark.parametrize("rest", ["", ',Ann "x"', ',"Ann, ""x"""', ',""'])
def test_a_word_in_quotes_is_text(word: str, rest: str) -> None:
    """Whatever the other cells of the row contain."""
    csv_format = Csv(columns_of())
    [row] = rows_of(csv_format, f'email,full_name,other\na@x,"{word}"{rest or ","}\n'.encode())

    assert row.message == User(email="a@x", full_name=word)
    assert f'a@x,"{word}",'.encode() in csv_format.reject(row, FAILURE)


@pytest.mark.parametrize("word", ["Null", "Na", "Nan", "NONE", "Nil", "NULLA", " NULL", "-"])
def test_similar_names_are_names(word: str) -> None:
    """People are called Null, Na and Nan."""
    [row] = rows_of(Csv(columns_of()), f"email,full_name\na@x,{word}\n".encode())

    assert row.message == User(email="a@x", full_name=word)


@pytest.mark.parametrize("word", ["NULL", r"\N", "NA", "-", "n/a", "."])
def test_null_says_which_unquoted_cells_are_unset(word: str) -> None:
    """In columns of any type; a quoted cell is text, and stays quoted in the rejects."""
    csv_format = Csv(columns_of(), null=[word])
    data = f'email,full_name,is_active\na@x,{word},{word}\nb@x,"{word}",\n'

    unset, text = rows_of(csv_format, data.encode())

    assert [unset.message, text.message] == [User(email="a@x"), User(email="b@x", full_name=word)]
    assert csv_format.reject(unset, FAILURE).endswith(f",a@x,{word},{word}\n".encode())
    assert csv_format.reject(text, FAILURE).endswith(f',b@x,"{word}",\n'.encode())


def test_a_word_in_a_column_that_is_not_read_is_no_failure() -> None:
    """Only the cells of fields matter."""
    [row] = rows_of(Csv(columns_of()), b"email,room\na@x,NULL\n")

    assert row.message == User(email="a@x")


@pytest.mark.parametrize("word", sorted(NULL_WORDS))
def test_an_exported_name_is_loaded_again(word: str) -> None:
    """Exports put such a name in quotes."""
    data = csv_line(["email", "full_name"]) + csv_lines({"email": ["a@x"], "full_name": [word]})

    [row] = rows_of(Csv(columns_of()), data)

    assert row.message == User(email="a@x", full_name=word)


ESCAPED = [
    ("\t", r"Two\nLines"),
    ("\t", r"A\tB"),
    ("\t", r"A\\B"),
    (",", r"Ada \"Countess\" Lovelace"),
    (";", r"5\""),
    (",", '"Two\\\nLines"'),
    ("|", '"Two\\\r\nLines"'),
]


@pytest.mark.parametrize(("delimiter", "cell"), ESCAPED)
def test_a_character_escaped_with_a_backslash_fails_its_row(delimiter: str, cell: str) -> None:
    """The text formats of PostgreSQL and MySQL would leave backslashes in the names."""
    [row] = rows_of(Csv(columns_of()), f"email{delimiter}full_name\na@x{delimiter}{cell}\n".encode())

    assert row.failure is not None
    assert "escaped with a backslash" in row.failure.message


LITERAL = [
    ("\t", r'"CORP\nancy"', r"CORP\nancy"),
    (",", r"CORP\nancy", r"CORP\nancy"),
    ("\t", r"CORP\Ada", r"CORP\Ada"),
    (",", "Ada\\", "Ada\\"),
    (",", r'"say \""x\"""', r"say \"x\""),
]


@pytest.mark.parametrize(("delimiter", "cell", "name"), LITERAL)
def test_other_backslashes_are_characters(delimiter: str, cell: str, name: str) -> None:
    """In quotes, and where they are not an escape of a known format."""
    [row] = rows_of(Csv(columns_of()), f"email{delimiter}full_name\na@x{delimiter}{cell}\n".encode())

    assert row.message == User(email="a@x", full_name=name)


def test_lines_of_code_in_a_post_can_end_with_a_backslash() -> None:
    """Unlike lines of a name."""
    [row] = rows_of(Csv(columns_of("posts")), b'title,author_id,content\nx,1,"make \\\n  all"\n')

    assert row.message == Post(title="x", author_id=1, content="make \\\n  all")


@pytest.mark.parametrize(
    "line",
    [
        "#TYPE System.Data.DataRow",
        "#TYPE System.Collections.Generic.Dictionary`2[[System.String,mscorlib],[System.Object]]",
        "#TYPE Selected.System.Management.Automation.PSCustomObject",
    ],
)
def test_skips_the_type_of_powershell(line: str) -> None:
    """Export-Csv writes it before the header."""
    [row] = rows_of(Csv(columns_of()), f'{line}\r\n"email","full_name"\r\n"a@x","Ada"\r\n'.encode())

    assert row.message == User(email="a@x", full_name="Ada")
    assert row.number == 3


@pytest.mark.parametrize("title_lines", [1, 2, 7])
def test_a_title_above_the_header_is_named(title_lines: int) -> None:
    """The sentence gives the number of the line that looks like the header."""
    data = "Staff\n" + "\n" * (title_lines - 1) + "email;full_name\na@x;Ada\n"

    with pytest.raises(
        SourceError, match=f"if line {title_lines + 1} is the header, delete the lines above it"
    ):
        rows_of(Csv(columns_of()), data.encode())


@pytest.mark.parametrize(
    "line",
    [
        "----|----",
        "-----+-----",
        "+-----+-----+",
        "|:---|---:|",
        "═════╪═════",
        "├─────┼─────┤",
        "----- -----",
        "-----,-----",
        "-----\t-----",
    ],
)
def test_refuses_tables_for_the_screen(line: str) -> None:
    """They pad cells with spaces, and break rows."""
    with pytest.raises(SourceError, match="the file is aligned table output, not CSV"):
        rows_of(Csv(columns_of()), f" email | full_name \n{line}\n a@x | Ada \n".encode())


@pytest.mark.parametrize("name", ["Enabled", "account_enabled", "isEnabled"])
def test_a_column_of_active_users_stops_the_load(name: str) -> None:
    """Without it, disabled users would be active."""
    with pytest.raises(UnknownColumn, match=f"add --columns is_active={name}; if not, add --ignore {name}"):
        columns_of().fields_of(["email", name])


@pytest.mark.parametrize(
    "name", ["blocked", "status", "deleted_at", "isDisabled", "banned_until", "Account Status"]
)
def test_a_column_of_inactive_users_stops_the_load(name: str) -> None:
    """It says the opposite, or has other words, so it can't be mapped."""
    with pytest.raises(
        UnknownColumn, match="write is_active instead, as true or false; if not, add --ignore"
    ):
        columns_of().fields_of(["email", name])


@pytest.mark.parametrize("name", ["mfa_enabled", "email_status", "state", "enabled_features"])
def test_other_states_are_ignored(name: str) -> None:
    """They say nothing about whether a user is active."""
    assert columns_of().fields_of(["email", name]) == ["email", None]


def test_a_state_is_ignored_if_is_active_is_there_or_is_not_read() -> None:
    """Posts have no such field."""
    assert columns_of().fields_of(["email", "is_active", "status"]) == ["email", "is_active", None]
    assert columns_of(mapping={"is_active": "on"}).fields_of(["on", "blocked"]) == ["is_active", None]
    assert columns_of(ignore=["status"]).fields_of(["email", "status"]) == ["email", None]
    assert columns_of("posts").fields_of(["title", "status"]) == ["title", None]
