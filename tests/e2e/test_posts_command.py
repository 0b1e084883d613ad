"""`roster posts`, on both databases; what a terminal shows, on one."""

import json
import re
from pathlib import Path
from textwrap import dedent

import pytest

from service.server import Server
from tests.support.command import ROSTER, Client, Ended, Roster
from tests.support.rows import add_posts, add_users
from tests.support.terminal import terminal

TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:]{8}\.\d{6}Z")


async def test_life_of_a_post(client: Client, server: Server, tmp_path: Path) -> None:
    """Each command prints the post as it is then; content comes from a file or from standard input."""
    await add_users(server.database, full_name="Ada")
    (tmp_path / "notes").write_text("Dear diary,\n\n\tid  9\n")
    (tmp_path / "empty").touch()
    file = str(tmp_path / "notes")

    created = await client.run(
        *("posts", "create", "--author", "user0@example.org", "--title", "Notes", "--content-file", file)
    )
    found = await client.run("posts", "get", "1")
    author = await client.run("posts", "get", "1", "--with-author", "--json")
    renamed = await client.run("posts", "update", "1", "--title", "More", "--version", "1", "--json")
    piped = await client.run("posts", "update", "1", "--content-file", "-", "--json", stdin=b"piped\n")
    empty = await client.run("posts", "update", "1", "--content-file", f"{tmp_path}/empty", "--json")
    deleted = await client.run("posts", "delete", "1", "--yes", "--json")
    gone = await client.run("posts", "get", "1")

    # The content is indented, so that it can't look like a field.
    assert TIME.sub("2026-03-01T09:30:00.000000Z", created.out) == dedent("""\
        id          1
        title       Notes
        author_id   1
        created_at  2026-03-01T09:30:00.000000Z
        updated_at  2026-03-01T09:30:00.000000Z
        version     1
        content     Dear diary,

                        id  9
    """)
    assert found == created
    assert json.loads(author.out)["content"] == "Dear diary,\n\n\tid  9\n"
    assert json.loads(author.out)["author"]["email"] == "user0@example.org"
    changed = [json.loads(done.out) for done in (renamed, piped, empty)]
    assert [(post["title"], post["content"], post["version"]) for post in changed] == [
        ("More", "Dear diary,\n\n\tid  9\n", 2),
        ("More", "piped\n", 3),
        ("More", "", 4),
    ]
    assert deleted == Ended(0, '{"deleted_post_id":1}\n', "")
    assert gone == Ended(1, "", "Error: post 1 does not exist\n")


async def test_lists_posts_of_an_author(client: Client, roster: Roster, server: Server) -> None:
    """By id or e-mail; a table has no content, and JSON is that of an export."""
    first, second = await add_users(server.database, 2)
    await add_posts(server.database, [first, second, first], content="a\nb")

    by_email = await client.run("posts", "list", "--author", "user0@example.org", "--order-by", "id desc")
    by_id = await client.run("posts", "list", "--author", "2", "--with-author")
    as_json = await client.run("posts", "list", "--json")
    exported = await roster.run("export", "posts")

    assert [line.split()[:4] for line in by_email.out.splitlines()] == [
        ["id", "author_id", "title", "created_at"],
        ["3", "1", "Post", "2"],
        ["1", "1", "Post", "0"],
    ]
    assert [line.split()[1] for line in by_id.out.splitlines()] == ["author", "user1@example.org"]
    assert as_json == Ended(0, exported.out, "")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_reads_content_from_a_terminal(server: Server, client: Client, tmp_path: Path) -> None:
    """It says what it waits for. A content of one line is below the other fields too."""
    await add_posts(server.database, await add_users(server.database))
    command = (ROSTER, "posts", "update", "1", "--content-file", "-", "--address", server.address)
    async with terminal(*command, columns=80, folder=tmp_path) as shown:
        await shown.shows("--content-file: reading the terminal until Ctrl-D")
        shown.type("Dear diary\n\x04")
        assert await shown.ended() == 0

    assert (await client.run("posts", "get", "1")).out.splitlines()[-1] == "content     Dear diary"


async def test_errors_are_in_the_words_of_the_options(client: Client, server: Server) -> None:
    """The status is 1 if the stored rows are the reason, otherwise 2; standard output is empty."""
    await add_posts(server.database, await add_users(server.database))
    for arguments, status, sentence in [
        ("get ada@example.org", 2, "'ada@example.org' is not a valid integer"),
        ("get 7", 1, "Error: post 7 does not exist"),
        ("list --author ada", 2, "'ada' is neither an id nor an e-mail"),
        ("list --author nobody@example.org", 1, "Error: there is no user nobody@example.org"),
        ("list --author 7", 1, "Error: user 7 does not exist"),
        ("create --author 1", 2, "Error: --title is required: 1 to 255 characters"),
        ("create --author 7 --title Notes", 1, "Error: user 7 does not exist"),
        ("create --author nobody@example.org --title Notes", 1, "Error: there is no user nobody@example.org"),
        ("create --author 1 --title Notes --content-file -", 2, "Error: --content-file - is not UTF-8"),
        ("update 1", 2, "there is nothing to change; pass --title or --content-file"),
        ("update 1 --title More --version 7", 1, "version is now 1; run `roster posts get 1`, then repeat"),
        ("delete 1", 2, "so nobody can be asked; --yes deletes post 1 by user 1, “Post 0”"),
        ("delete 1 --yes --version 7", 1, "version is now 1"),
        ("delete 7 --yes", 1, "Error: post 7 does not exist"),
        ("delete 7 --dry-run", 1, "Error: post 7 does not exist"),
    ]:
        done = await client.run("posts", *arguments.split(), stdin=b"\xff")
        assert (done.status, done.out) == (status, ""), arguments
        assert sentence in " ".join(done.err.split()), arguments
    assert (await client.run("count", "posts")).out == "1\n"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_deletes_only_what_it_has_shown(server: Server, client: Client, tmp_path: Path) -> None:
    """It shows the title, so that a wrong id is noticed; it fails if the post changes before the answer."""
    await add_posts(server.database, await add_users(server.database), title="No\x1btes" + 40 * "s")
    command = (ROSTER, "posts", "delete", "1", "--address", server.address)
    async with terminal(*command, columns=80, folder=tmp_path) as shown:
        await shown.shows("[y/N]: ")
        await client.run("posts", "update", "1", "--title", "More")
        shown.type("y\n")
        assert await shown.ended() == 1

    question, *error = shown.lines
    title = r"No\u001btes" + 28 * "s" + "…"
    assert question == f"Delete post 1 by user 1, “{title}”? This can't be undone. [y/N]: y"
    assert " ".join(" ".join(error).split()) == (
        "Error: version is now 2; run `roster posts get 1`, then repeat this with --version 2"
    )
    assert (await client.run("count", "posts")).out == "1\n"
