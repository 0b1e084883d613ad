"""The parts of a mirror that need no server: values, limits, and the difference of two tables."""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import click
import pytest
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st

from roster.errors import InvalidField, InvalidFilter
from roster.v1.resources_pb2 import User
from service.cli import main
from service.cli.mirror import difference
from service.cli.mirror.difference import Difference
from service.cli.mirror.filters import row_conditions
from service.cli.mirror.options import DeleteLimitType
from service.cli.mirror.steps import with_parked
from service.cli.mirror.values import (
    FileRow,
    StoredUser,
    compared_columns,
    row_from_message,
    users_from_columns,
)

names = st.sampled_from([None, "", "a", "A", "é", "\U0001f600"])
addresses = st.integers(1, 12).map(lambda number: f"user{number}@example.org")


def row(
    number: int, email: str | None, id: int | None = None, name: str | None = None, active: bool = True
) -> FileRow:
    """Return a row of a file without problems."""
    return FileRow(number, id, email, name, active, None, None, None)


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, FileRow], dict[str, StoredUser]]:
    """Return a file and a table, both by e-mail and in any order."""
    file = draw(st.lists(st.tuples(addresses, names, st.booleans()), unique_by=lambda values: values[0]))
    table = draw(st.lists(st.tuples(addresses, names, st.booleans()), unique_by=lambda values: values[0]))
    rows = {
        email: row(number, email, name=name, active=active)
        for number, (email, name, active) in enumerate(file, 2)
    }
    users = {
        email: StoredUser(id, id % 3 + 1, email, name, active)
        for id, (email, name, active) in enumerate(table, 1)
    }
    return rows, users


@settings(max_examples=40)
@given(
    tables(), st.sampled_from([[], ["full_name"], ["is_active"], ["full_name", "is_active"]]), st.booleans()
)
def test_lists_exactly_the_differences(
    sides: tuple[dict[str, FileRow], dict[str, StoredUser]], columns: list[str], keeps_inactive: bool
) -> None:
    """A model in plain Python finds the same; updates and deletes are in the order of ids."""
    rows, users = sides
    with closing(Difference("email")) as both:
        both.add_rows(list(rows.values()))
        both.add_users(list(users.values()))
        both.sort()
        counts = both.compare(columns, keeps_inactive=keeps_inactive)

        missing = [user for user in users.values() if user.email not in rows]
        deletes = [user.id for user in missing if user.is_active or not keeps_inactive]
        updates = [
            (user.id, user.version, rows[user.email].number)
            for user in users.values()
            if user.email in rows
            and any(getattr(user, name) != getattr(rows[user.email], name) for name in columns)
        ]
        creates = [row.number for row in rows.values() if row.email not in users]
        assert [row.id for row in both.read(both.deletes)] == deletes
        found = [(row.id, row.version, row.number) for row in both.read(both.updates)]
        assert found == updates
        assert [row.number for row in both.read(both.creates)] == creates
        removable = [user for user in users.values() if user.is_active or not keeps_inactive]
        listed = (len(deletes), len(updates), len(creates))
        assert counts == (len(rows), len(users), len(removable), *listed)


@settings(max_examples=40)
@given(st.permutations(range(1, 8)), st.permutations(range(1, 8)))
def test_emails_are_traded_one_user_at_a_time(before: list[int], after: list[int]) -> None:
    """Once the later owners are parked, no update finds its e-mail taken, wherever batches end."""
    old = {id: f"user{number}@example.org" for id, number in enumerate(before, 1)}
    new = {id: f"user{number}@example.org" for id, number in enumerate(after, 2)}
    with closing(Difference("id")) as both:
        both.add_users([StoredUser(id, 1, email, None, True) for id, email in old.items()])
        both.add_rows([row(id, email, id) for id, email in new.items() if id in old])
        both.sort()
        both.compare(["email"])
        for deleted in both.read(both.deletes):
            del old[deleted.id]
        for parked in both.read(both.parks):
            old[parked.id] = f"parked {parked.id}"
        both.count_parks()
        versions = {user.id: user.version for user in both.read(both.updates)}
        for user in both.read(both.updates):
            assert user.email not in old.values()
            old[user.id] = user.email

        assert old == {id: email for id, email in new.items() if id in old}
        assert versions == {id: 1 + (id in parked_ids(both)) for id in versions}


def parked_ids(both: Difference) -> set[int]:
    return {user.id for user in both.read(both.parks)}


def test_reads_a_list_from_any_offset() -> None:
    """Lists are longer than what is read at once."""
    with closing(Difference("email")) as both:
        both.add_rows([row(number, f"{number}@example.org") for number in range(2500)])
        both.sort()
        both.compare([])
        assert [row.number for row in both.read(both.creates, 999)] == [*range(999, 2500)]
        assert both.row(both.creates, 1200).number == 1200


def test_finds_rows_and_users_with_one_key() -> None:
    """Groups are reported by their first and last member."""
    with closing(Difference("email")) as both:
        both.add_rows([row(number, f"{number % 4}@example.org") for number in (2, 3, 4, 5, 6, 10)])
        both.add_users([StoredUser(id, 1, "0@example.org", None, True) for id in (7, 8)])
        both.add_users([StoredUser(id, 1, "none@example.org", None, True) for id in (9, 10)])
        both.sort()

        assert both.repeated("email", 5) == [[2, 10]]
        assert both.repeated("email", 0) == []
        assert both.ambiguous(5) == [[7, 8]]


def test_finds_emails_of_users_who_keep_them() -> None:
    """A user who is only deactivated keeps the e-mail that a row would give to another."""
    with closing(Difference("id")) as both:
        both.add_users([StoredUser(id, 1, f"{id}@example.org", None, True) for id in (1, 2, 3)])
        both.add_rows([row(2, "2@example.org", 1), row(3, "1@example.org", 3), row(4, "x@y", 4)])
        both.sort()
        both.compare(["email"])

        assert both.kept_emails(5) == [2]


@pytest.fixture
def compared() -> Iterator[Difference]:
    """A file that renames one user and adds another; the users are found by id."""
    with closing(Difference("id")) as both:
        both.add_users([StoredUser(1, 1, "ada@example.org", "Ada", False)])
        both.add_rows([row(2, "b@example.org", 1, "Ada"), row(3, "new@example.com", 9)])
        both.sort()
        both.compare(["email"])
        yield both


@pytest.mark.parametrize(
    ("text", "outside"),
    [
        ("", []),
        ('email = "B@Example.org" OR id > 1', []),
        ('email = "*@example.org"', [3]),
        ('full_name = "Ada"', [3]),  # null for a new user
        ("is_active = false", [3]),  # the present value of a user, true for a new one
        ("is_active = true", [2]),
    ],
)
async def test_filter_is_applied_to_rows(compared: Difference, text: str, outside: list[int]) -> None:
    """In columns that the file does not have, an existing user keeps the value."""
    conditions = await row_conditions(text, compared, deactivates=False)

    assert compared.outside(conditions, 5) == outside


@pytest.mark.parametrize(
    ("text", "deactivates", "reason"),
    [
        ('created_at > "2026-01-01T00:00:00Z"', False, 'unknown field "created_at"'),
        ("is_active = true", True, "users who come back"),
        ("email", False, "expected an operator"),
    ],
)
async def test_filter_has_only_fields_of_files(
    compared: Difference, text: str, deactivates: bool, reason: str
) -> None:
    """The error says why: the times of a new user are not known."""
    with pytest.raises(InvalidFilter, match=reason):
        await row_conditions(text, compared, deactivates=deactivates)


def test_row_is_compared_as_the_server_stores_it() -> None:
    """The e-mail is normalised; an unset name is null, and an unset is_active true."""
    values = row_from_message(7, User(email=" Ada@BÜCHER.example. ", full_name=""), "email")

    assert values == FileRow(7, None, "ada@bücher.example", "", True, None, None, None)
    assert row_from_message(7, User(email="a@b", is_active=False), "email").is_active is False


@pytest.mark.parametrize(
    ("message", "key", "reason"),
    [
        (User(full_name="Ada"), "email", "email is required"),
        (User(email="no address"), "email", "email must be one name"),
        (User(email="a@example.org"), "id", "id is required"),
        (User(id=-1), "id", "id must be from 1"),
        (User(id=1, email="no address"), "id", "email must be one name"),
        (User(email="a@example.org", password="secret"), "email", "password can't be loaded"),
    ],
)
def test_row_without_a_usable_key_is_refused(message: User, key: str, reason: str) -> None:
    """It could be anybody's."""
    with pytest.raises(InvalidField, match=reason):
        row_from_message(1, message, key)


@pytest.mark.parametrize(
    ("message", "key", "problem", "create_problem"),
    [
        (User(email="a,b@example.org"), "email", None, "email must be one address alone"),
        (User(email="a@example.org", hashed_password="?"), "email", None, "hashed_password"),
        (
            User(email="a@example.org", full_name=256 * "a"),
            "email",
            "full_name is longer",
            "full_name is longer",
        ),
        (User(id=1, email="a,b@example.org"), "id", "email must be one", "email must be one"),
        (User(id=1), "id", None, "email is required for a new user"),
    ],
)
def test_other_rules_are_for_values_that_are_written(
    message: User, key: str, problem: str | None, create_problem: str
) -> None:
    """A user whom an earlier release stored may break today's rules, and stays."""
    values = row_from_message(1, message, key)

    assert (values.problem or "").startswith(problem or "")
    assert bool(values.problem) == bool(problem)
    assert (values.create_problem or "").startswith(create_problem)


def test_stored_emails_are_compared_in_their_normal_form() -> None:
    """Earlier releases stored domains in ASCII."""
    columns: dict[str, list[Any]] = {
        "id": [1],
        "version": [2],
        "email": ["ada@xn--bcher-kva.example"],
        "full_name": [None],
        "is_active": [True],
    }

    assert users_from_columns(columns) == [StoredUser(1, 2, "ada@bücher.example", None, True)]


@pytest.mark.parametrize(
    ("found", "key", "deactivates", "columns"),
    [
        ({"email", "full_name", "hashed_password"}, "email", False, ["full_name"]),
        ({"email", "full_name"}, "email", True, ["full_name", "is_active"]),
        ({"id", "email", "is_active"}, "id", True, ["email", "is_active"]),
        ({"email"}, "email", False, []),
    ],
)
def test_compares_the_columns_of_the_file(
    found: set[str], key: str, deactivates: bool, columns: list[str]
) -> None:
    """Hashes can't be read back."""
    assert compared_columns(found, key, deactivates=deactivates) == columns


@pytest.mark.parametrize(
    ("text", "deletes", "matching", "allowed"),
    [
        ("10%", 10, 100, True),
        ("10%", 11, 100, False),
        ("10%", 1, 9, False),
        ("0.1%", 1, 1000, True),
        ("100%", 5, 5, True),
        ("3", 3, 3, True),
        ("3", 4, 1000, False),
        ("0", 0, 0, True),
        ("0%", 0, 0, True),
    ],
)
def test_limit_is_a_number_or_a_percentage(text: str, deletes: int, matching: int, allowed: bool) -> None:
    """A percentage is of the users that match."""
    limit = DeleteLimitType().convert(text, None, None)

    assert limit.allows(deletes, matching) is allowed
    assert DeleteLimitType().convert(limit, None, None) is limit


@pytest.mark.parametrize("text", ["", "ten", "-1", "1e3", "101%", "5 %%", "٣"])
def test_other_limits_are_refused(text: str) -> None:
    """The error shows both forms."""
    with pytest.raises(click.BadParameter, match=r"500|100%"):
        DeleteLimitType().convert(text, None, None)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--mirror --update", "--update and --mirror are two operations"),
        ("--delete --restore", "--restore and --delete are two operations"),
        ("--mirror --load-id a", "--load-id is not for --mirror: each run makes a new plan"),
        ("--mirror --on-conflict skip", "--on-conflict is not for --mirror"),
        ("--mirror --atomicity batch", "--atomicity is not for --mirror"),
        ("--mirror --validate-only", "--validate-only is not for --mirror: use --dry-run"),
        ("--mirror --on-missing skip", "--on-missing is for --delete"),
        ("--delete --update-mask email", "--update-mask is not for --delete"),
        ("--dry-run", "--dry-run is for --mirror"),
        ("--update --filter a", "--filter is for --mirror"),
    ],
)
def test_options_that_do_not_belong_together_are_refused(options: str, sentence: str) -> None:
    """The error names both."""
    ended = CliRunner().invoke(main, ["load", "users", __file__, *options.split()])

    assert ended.exit_code == 2
    assert sentence in ended.stderr


@pytest.mark.parametrize("text", ["", "  "])
def test_blank_filter_is_refused(text: str) -> None:
    """It may be that of an unset variable, and without a filter all users are mirrored."""
    ended = CliRunner().invoke(main, ["load", "users", __file__, "--mirror", "--filter", text])

    assert ended.exit_code == 2
    assert "'--filter': it is empty; leave out the option to mirror all users" in ended.stderr


def test_parked_user_is_found_by_the_filter_it_was_parked_under() -> None:
    """Another mirror may have parked a user who never matched this one."""
    first, second = (with_parked(f'email = "*@{domain}"') for domain in ("example.org", "example.com"))

    assert first.startswith('(email = "*@example.org") OR email = "mirror-')
    assert first.rpartition(" OR ")[2] != second.rpartition(" OR ")[2]


def test_missing_folder_for_temporary_files_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose file system is read-only."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    path = tmp_path / "users.csv"
    path.write_text("email\na@example.org\n")

    ended = CliRunner().invoke(main, ["load", "users", str(path), "--mirror"])

    assert ended.exit_code == 2
    assert "No usable temporary directory found in ['/nowhere']; nothing was written\n" in ended.stderr


def test_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence names the folder, and says that nothing was written."""
    monkeypatch.setattr(difference, "PRAGMAS", (*difference.PRAGMAS, "max_page_count = 30"))
    path = tmp_path / "users.csv"
    path.write_text("email\n" + "".join(f"{number}@example.org\n" for number in range(5000)))

    ended = CliRunner().invoke(main, ["load", "users", str(path), "--mirror"])

    assert ended.exit_code == 2
    sentence = f"the folder for temporary files, {gettempdir()}, can't be used: database or disk is full"
    assert sentence in ended.stderr
    assert ended.stderr.endswith("set TMPDIR to another folder; nothing was written\n")


@pytest.mark.parametrize("option", ["--mirror", "--delete --restrict"])
def test_posts_are_not_mirrored(option: str) -> None:
    """They have no key but the id, and no posts."""
    ended = CliRunner().invoke(main, ["load", "posts", __file__, *option.split()])

    assert ended.exit_code == 2
    assert f"{option.rsplit(maxsplit=1)[-1]} is for users" in ended.stderr
