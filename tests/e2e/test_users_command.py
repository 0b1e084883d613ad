"""`roster users`, on both databases; what a terminal shows, on one."""

import json
import re
from pathlib import Path
from textwrap import dedent
from typing import Any
from uuid import uuid4

import pytest

from roster.v1.users_pb2 import VerifyPasswordRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service import idempotency
from service.server import Server
from tests.support.command import ROSTER, Client, Ended, Roster, run
from tests.support.rows import add_posts, add_users, read_emails
from tests.support.terminal import terminal

TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{6}Z")
CTRL_C = "\x03"
SHORT_TIME = re.compile(r"\d{4}-\d\d-\d\d [\d:]{8}")


def record(text: str) -> dict[str, str]:
    """Return the fields of a record."""
    return {name: value for name, _, value in (line.partition(" ") for line in text.splitlines())}


async def create(client: Client, *arguments: str) -> dict[str, object]:
    """Create a user, and return it."""
    done = await client.run("users", "create", *arguments, "--json")
    assert done.status == 0, done.err
    row: dict[str, object] = json.loads(done.out)
    return row


async def test_life_of_a_user(client: Client) -> None:
    """Each command prints the user as it is then; an id and an e-mail are equal."""
    created = await client.run("users", "create", "--email", "Ada@Example.org", "--full-name", "Ada")
    found = await client.run("users", "get", "ada@example.org")
    named = await client.run("users", "update", "1", "--full-name", "Ada King", "--version", "1")
    cleared = await client.run("users", "update", " ada@EXAMPLE.org", "--clear", "full_name")
    inactive = await client.run("users", "deactivate", "ada@example.org", "--json")
    again = await client.run("users", "deactivate", "1", "--json")
    stale = await client.run("users", "deactivate", "1", "--version", "1")
    active = await client.run("users", "update", "1", "--active", "--email", "king@example.org", "--json")
    deleted = await client.run("users", "delete", "king@example.org", "--yes", "--json")
    gone = await client.run("users", "get", "1")

    assert TIME.sub("2026-03-01T09:30:00.000000Z", created.out) == dedent("""\
        id          1
        email       ada@example.org
        full_name   Ada
        is_active   true
        created_at  2026-03-01T09:30:00.000000Z
        updated_at  2026-03-01T09:30:00.000000Z
        version     1
    """)
    assert found == created
    assert (record(named.out)["full_name"].strip(), record(cleared.out)["full_name"]) == ("Ada King", "")
    assert (json.loads(inactive.out)["is_active"], json.loads(inactive.out)["version"]) == (False, 4)
    assert again == Ended(0, inactive.out, "the user is already inactive; nothing was changed\n")
    assert (stale.status, stale.err[:25]) == (1, "Error: version is now 4; ")
    assert [json.loads(active.out)[name] for name in ("email", "is_active", "version")] == [
        "king@example.org",
        True,
        5,
    ]
    assert deleted == Ended(0, '{"deleted_user_id":1}\n', "")
    assert gone == Ended(1, "", "Error: user 1 does not exist\n")


async def test_lists_are_pages_with_a_limit(client: Client, server: Server, roster: Roster) -> None:
    """50 rows unless `--limit` says otherwise; standard error says how to get more."""
    await add_users(server.database, 1200)

    first = await client.run("users", "list", "--json")
    token = first.err.split()[-1]
    second = await client.run("users", "list", "--limit", "2", "--page-token", token)
    everything = await roster.run("users", "list", "--limit", "0", "--json")
    exported = await roster.run("export", "users")
    last = await client.run("users", "list", "--limit", "1", "--order-by", "id desc")
    none = await client.run("users", "list", "--filter", 'email = "nobody@example.org"')

    assert [json.loads(line)["id"] for line in first.out.splitlines()] == [*range(1, 51)]
    assert " with the same --order-by and --page-token " in last.err
    assert first.err.startswith(
        "there are more: list all with --limit 0, or the next ones with --page-token "
    )
    assert [line.split()[0] for line in second.out.splitlines()] == ["id", "51", "52"]
    assert everything == Ended(0, exported.out, "")
    assert last.out.splitlines()[1].split()[:2] == ["1200", "user1199@example.org"]
    assert none == Ended(0, "", "no rows found\n")


async def test_with_posts(client: Client, server: Server) -> None:
    """A table has their number, JSON the posts without content, and a record a table below it."""
    first, second = await add_users(server.database, 2)
    await add_posts(server.database, [first] * 51 + [second])

    counted = await client.run("users", "list", "--with-posts")
    shown = await client.run("users", "get", str(second), "--with-posts")
    as_json = await client.run("users", "get", str(second), "--with-posts", "--json")
    newest = await client.run("users", "get", str(first), "--with-posts")

    assert [line.split()[-2] for line in counted.out.splitlines()] == ["posts", "50+", "1"]
    above, below = shown.out.split("\n\n")
    assert record(above)["email"].strip() == "user1@example.org"
    assert below.splitlines()[1].split()[:4] == ["52", "2", "Post", "51"]
    [post] = json.loads(as_json.out)["posts"]
    assert [*post] == ["id", "title", "author_id", "created_at", "updated_at", "version"]
    assert newest.err == "these are the newest; `roster posts list --author 1` lists all\n"


async def test_passwords_come_from_files(client: Client, users: UserServiceAsyncStub, tmp_path: Path) -> None:
    """Or from standard input, without the end of the line; no output has them."""
    (tmp_path / "password").write_text("correct horse\n")
    (tmp_path / "hash").write_text("$2b$04$" + "a" * 53)
    (tmp_path / "empty").write_text("\n")
    row = await create(client, "--email", "ada@example.org", "--password-file", str(tmp_path / "password"))
    by_file = await users.VerifyPassword(VerifyPasswordRequest(id=1, password="correct horse"))
    piped = await client.run("users", "update", "1", "--password-file", "-", stdin=b"battery\r\n")
    by_pipe = await users.VerifyPassword(VerifyPasswordRequest(id=1, password="battery"))
    hashed = await client.run("users", "update", "1", "--hashed-password-file", str(tmp_path / "hash"))
    empty = await client.run("users", "create", "--email", "b@x.org", "--password-file", f"{tmp_path}/empty")

    assert (by_file.valid, by_pipe.valid, hashed.status) == (True, True, 0)
    assert not re.search("password|horse|battery|2b", f"{row} {piped.out} {hashed.out}")
    assert (empty.status, empty.out) == (2, "")
    assert empty.err.endswith("/empty has no text\n")


async def test_repeats_a_command_by_its_request_id(client: Client) -> None:
    """The second one gets the first answer."""
    arguments = ("--email", "ada@example.org", "--request-id", str(uuid4()))
    assert await create(client, *arguments) == await create(client, *arguments)


async def test_makes_sure_that_a_user_exists(client: Client) -> None:
    """In one call; an update writes only what the command names."""
    await create(client, "--email", "ada@example.org", "--full-name", "Ada", "--inactive")

    arguments = ("--email", "Ada@example.org", "--full-name", "Ada King", "--on-conflict")
    skipped = await create(client, *arguments, "skip")
    updated = await create(client, *arguments, "update")
    other = await create(client, "--email", "b@example.org", "--on-conflict", "skip")

    assert [skipped[name] for name in ("id", "full_name", "version")] == [1, "Ada", 1]
    assert [updated[name] for name in ("id", "full_name", "version", "is_active")] == [
        *(1, "Ada King", 2),
        False,
    ]
    assert (other["email"], other["version"]) == ("b@example.org", 1)


async def test_says_what_was_done(client: Client) -> None:
    """On standard error, if the command allows several outcomes; a dry run says what would be done."""
    arguments = ("users", "create", "--email", "ada@example.org", "--full-name", "Ada", "--on-conflict")
    outcomes: list[str] = []
    for mode in ("skip", "skip", "update"):
        dry = await client.run(*arguments, mode, "--dry-run")
        done = await client.run(*arguments, mode)
        outcomes += [dry.err.partition("\n")[0], done.err.rstrip()]

    assert outcomes == [
        "the user would be created",
        "the user was created",
        "the user exists, and would not be changed",
        "the user exists, and was not changed",
        "the user exists, and would be updated",
        "the user exists, and was updated",
    ]


async def test_dry_runs_write_nothing(client: Client, server: Server) -> None:
    """They print the row as it would be, and fail as the command would."""
    await add_users(server.database)
    before = await client.run("users", "list", "--json")

    created = await client.run("users", "create", "--email", "ada@example.org", "--json", "--dry-run")
    updated = await client.run("users", "update", "1", "--inactive", "--json", "--dry-run")
    taken = await client.run("users", "create", "--email", "user0@example.org", "--dry-run")
    inactive = await client.run("users", "deactivate", "user0@example.org", "--json", "--dry-run")
    deleted = await client.run("users", "delete", "user0@example.org", "--json", "--dry-run")

    for done in (created, updated):
        assert (done.status, done.err) == (0, "dry run: nothing was written\n")
    row = {"id": None, "email": "ada@example.org", "is_active": True, "created_at": None, "version": 1}
    assert json.loads(created.out).items() >= row.items()
    assert json.loads(updated.out)["is_active"] is False
    assert (taken.status, taken.out) == (1, "")
    assert [json.loads(inactive.out)[name] for name in ("is_active", "version")] == [False, 2]
    assert inactive.err == "the user would be deactivated\ndry run: nothing was written\n"
    assert deleted.out == before.out
    assert deleted.err == "user 1 and 0 posts would be deleted\ndry run: nothing was written\n"
    assert await client.run("users", "list", "--json") == before


async def test_reports_dry_runs_that_were_none(
    client: Client, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server of an earlier release ignores what it does not know, and has written the row."""
    await add_posts(server.database, await add_users(server.database))
    original = idempotency.idempotent

    async def ignore_dry_run(database: Any, repository: Any, request: Any, *rest: Any) -> Any:
        request.ClearField("validate_only")
        return await original(database, repository, request, *rest)

    monkeypatch.setattr(idempotency, "idempotent", ignore_dry_run)
    for arguments, written in [
        ("users create --email a@x.org", "created user 2"),
        ("users create --email b@x.org --on-conflict skip", "created user 3"),
        ("users create --email b@x.org --on-conflict update --inactive", "updated user 3"),
        ("users update 1 --inactive", "updated user 1"),
        ("posts create --author 1 --title A", "created post 2"),
        ("posts update 1 --title A", "updated post 1"),
    ]:
        done = await client.run(*arguments.split(), "--dry-run")
        sentence = f"Error: the server is of a release that does not know --dry-run, and has {written}\n"
        assert done == Ended(2, "", sentence), arguments


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_reports_a_full_disk(server: Server, tmp_path: Path) -> None:
    """The end of the process does not write again, which would replace the exit status."""
    await add_users(server.database)
    command = f"{ROSTER} users list --address {server.address} > /dev/full"
    done = await run("sh", "-c", command, folder=tmp_path, PYTHONUNBUFFERED="")

    assert done == Ended(2, "", "Error: can't write standard output: No space left on device\n")


async def test_errors_are_in_the_words_of_the_options(client: Client, server: Server) -> None:
    """The status is 1 if the stored rows are the reason, otherwise 2; standard output is empty."""
    await add_users(server.database, 2)
    for arguments, status, sentence in [
        ("get ada", 2, "'ada' is neither an id nor an e-mail"),
        ("get 0", 2, "an id is from 1 to 9007199254740992"),
        ("get 99999999999999999", 2, "an id is from 1 to 9007199254740992"),
        ("get a@b@c", 2, "Error: 'a@b@c': email must be one name, one @ and one domain, without spaces"),
        ("get nobody@example.org", 1, "Error: there is no user nobody@example.org"),
        ("list --filter id=", 2, "Error: --filter: at character 4: expected a value"),
        ("list --order-by name", 2, "Error: --order-by: at character 1: expected one field"),
        (
            "list --page-token x",
            2,
            "Error: --page-token is damaged; send the token that a list ended with unchanged",
        ),
        ("create --email @", 2, "Error: --email must be one name, one @ and one domain"),
        (
            "create --email user0@example.org",
            1,
            "another user, whose id is 1; pass --on-conflict skip or update, or run `roster users update 1`",
        ),
        ("create --email a@b.org --request-id 7", 2, "Error: --request-id must be a UUID"),
        ("create --email a@b.org --on-conflict update", 2, "needs something to change, such as --full-name"),
        (
            "create --email a@b.org --password-file - --hashed-password-file -",
            2,
            "are both passwords; pass one",
        ),
        ("create --email a@b.org --password-file /nowhere", 2, "File '/nowhere' does not exist."),
        ("update 1", 2, "there is nothing to change; pass an option such as --full-name"),
        (
            "update 1 --clear full_name --full-name A",
            2,
            "--clear full_name and --full-name contradict each other",
        ),
        ("update a@b@c --email a@b.org", 2, "Error: 'a@b@c': email must be one name"),
        (
            "update user1@example.org --email user0@example.org",
            1,
            "Error: the e-mail user0@example.org belongs to another user, whose id is 1",
        ),
        (
            "update user1@example.org --active --version 7",
            1,
            "version is now 1; run `roster users get user1@example.org`, then repeat this with --version 1",
        ),
        ("update 1 --active --version x", 2, "'x' is not a valid integer."),
        ("deactivate 1 --version 7", 1, "version is now 1; run `roster users get 1`"),
        (
            "delete 1",
            2,
            "so nobody can be asked; --yes deletes user 1 (user0@example.org) and 0 posts",
        ),
        ("delete 1 --dry-run --version 7", 1, "version is now 1"),
        ("delete 1 --yes --version 7", 1, "version is now 1"),
        ("delete 7 --yes", 1, "Error: user 7 does not exist"),
        ("delete 7 --dry-run", 1, "Error: user 7 does not exist"),
    ]:
        done = await client.run("users", *arguments.split())
        assert (done.status, done.out) == (status, ""), arguments
        assert sentence in " ".join(done.err.split()), arguments
    assert await read_emails(server.database) == ["user0@example.org", "user1@example.org"]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
class TestTerminal:
    """A terminal of 80 columns. One database is enough: the output is independent of it."""

    async def test_table_fits(self, server: Server, client: Client, tmp_path: Path) -> None:
        """Only names are cut, by their width; no text of a row can control the terminal."""
        for name in ("Ada", "\x1b[31mred\x07", "東京都千代田区丸の内一丁目九番一号", "x" * 200):
            await create(client, "--email", f"{len(name)}@example.org", "--full-name", name)
        command = (ROSTER, "users", "list", "--address", server.address)
        async with terminal(*command, columns=80, folder=tmp_path) as shown:
            assert await shown.ended() == 0

        assert SHORT_TIME.sub("2026-03-01 09:30:00", shown.output.replace("\r", "")) == dedent(r"""
            id  email            full_name           is_active  updated_at           version
             1  3@example.org    Ada                 true       2026-03-01 09:30:00        1
             2  9@example.org    \u001b[31mred\u00…  true       2026-03-01 09:30:00        1
             3  17@example.org   東京都千代田区丸…   true       2026-03-01 09:30:00        1
             4  200@example.org  xxxxxxxxxxxxxxxxx…  true       2026-03-01 09:30:00        1
        """).lstrip("\n")

    async def test_asks_before_it_deletes(self, server: Server, client: Client, tmp_path: Path) -> None:
        """It says how many posts go too; only `y` deletes, and only the user that was shown."""
        await add_users(server.database, full_name="A\x1bda")
        await add_posts(server.database, [1, 1])
        command = (ROSTER, "users", "delete", "user0@example.org", "--address", server.address)
        for answer, status, left in [("n", 1, 1), (CTRL_C, 130, 1), ("y", 1, 1), ("y", 0, 0)]:
            async with terminal(*command, columns=80, folder=tmp_path) as shown:
                await shown.shows("[y/N]: ")
                if (answer, status) == ("y", 1):
                    await client.run("users", "update", "1", "--inactive")
                shown.type(f"{answer}\n")
                assert await shown.ended() == status
            assert len(await read_emails(server.database)) == left

        question = r"Delete user 1 (user0@example.org, A\u001bda) and 2 posts? This can't be undone. [y/N]: "
        assert shown.output.startswith(question)

    async def test_asks_for_the_password(
        self, server: Server, users: UserServiceAsyncStub, tmp_path: Path
    ) -> None:
        """Twice, and without an echo."""
        await add_users(server.database)
        command = (ROSTER, "users", "update", "1", "--password-file", "-", "--address", server.address)
        async with terminal(*command, columns=80, folder=tmp_path) as shown:
            await shown.shows("Password: ")
            shown.type("battery\n")
            await shown.shows("Repeat for confirmation: ")
            shown.type("battery\n")
            assert await shown.ended() == 0

        assert "battery" not in shown.output
        assert (await users.VerifyPassword(VerifyPasswordRequest(id=1, password="battery"))).valid
