"""Inputs of `roster load`: pipes, compressed documents, and inputs that are not files of rows."""

import gzip
import json

import pytest

from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from tests.support.command import Roster
from tests.support.users import list_users

PEOPLE = [{"email": "ada@example.org"}, {"email": "alan@example.org"}]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the command is independent of it."""
    return sqlite_url


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gzip"])
async def test_loads_a_document_from_a_pipe(
    roster: Roster, users: UserServiceAsyncStub, packed: type
) -> None:
    """It is read once, so the array must have the name of the entity."""
    document = json.dumps({"realm": "x", "users": PEOPLE}, indent=2).encode()

    done = await roster.run("load", "users", "-", "--load-id", "staff", stdin=packed(document))

    assert (done.status, done.err) == (0, "")
    assert len(await list_users(users)) == 2


@pytest.mark.parametrize("kind", ["ndjson", "csv", "parquet"])
async def test_empty_standard_input_leaves_its_load_id_unused(
    roster: Roster, users: UserServiceAsyncStub, kind: str
) -> None:
    """The command before the pipe has failed; the next run, with rows, is the first of the load."""
    command = ("load", "users", "-", "--load-id", "nightly")

    failed = await roster.run(*command, "--format", kind)
    done = await roster.run(*command, stdin=b'{"email": "ada@example.org"}\n')

    assert failed.status == 2
    assert "stdin: the input is empty; check the command that writes to it" in " ".join(failed.err.split())
    assert done.status == 0
    assert len(await list_users(users)) == 1


@pytest.mark.parametrize("name", ["users.ndjson", "users.csv", "users.ndjson.gz"])
async def test_an_error_page_opens_no_load(roster: Roster, name: str) -> None:
    """It was saved by a download that did not look at the status."""
    page = b"<!DOCTYPE html>\n<html><body>\nNot found\n</body></html>\n"
    (roster.folder / name).write_bytes(gzip.compress(page) if name.endswith(".gz") else page)

    done = await roster.run("load", "users", name)

    assert done.status == 2
    assert "the file is HTML or XML, such as the error page of a server" in " ".join(done.err.split())
    assert (await roster.run("loads", "--json")).out == ""


@pytest.mark.parametrize("name", ["users.csv.zip", "users.tar", "users.csv.tar.gz", "users.tgz"])
async def test_archives_are_refused_by_their_names(roster: Roster, name: str) -> None:
    """Another --format would not help."""
    (roster.folder / name).write_bytes(b"")

    done = await roster.run("load", "users", name)

    assert done.status == 2
    assert f"{name} is an archive; unpack it, and load the file inside" in " ".join(done.err.split())


async def test_null_says_which_texts_are_missing_values(roster: Roster, users: UserServiceAsyncStub) -> None:
    """Without it such rows fail, and it is a part of the id of the load."""
    (roster.folder / "users.csv").write_bytes(b"email,full_name\na@example.org,\\N\nb@example.org,Ada\n")

    refused = await roster.run("load", "users", "users.csv")
    loaded = await roster.run("load", "users", "users.rejects.csv", "--null", "\\N")
    other = await roster.run("load", "users", "users.ndjson", "--null", "NULL")

    assert refused.status == 1
    assert "add --null '\\N'; if it is text, put it in quotes" in " ".join(refused.out.split())
    assert loaded.status == 0
    assert {user.email: user.full_name for user in await list_users(users)} == {
        "a@example.org": "",
        "b@example.org": "Ada",
    }
    assert other.status == 2
