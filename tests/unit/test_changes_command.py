"""Parts of `roster changes`: its arguments, the file with its token, and the lines that it prints."""

import json
from collections.abc import Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from roster.v1.changes_pb2 import Change
from roster.v1.resources_pb2 import Post, User
from service.cli import main
from service.cli.changes import change_lines
from service.cli.export import WRITERS, Export
from service.cli.rows import ENTITIES, USERS, columns_of
from service.cli.terminal import UsageError
from service.cli.watch_token import WatchTokenFile

NOON = 1_706_702_400


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "token"


def test_keeps_the_last_token(path: Path) -> None:
    """Only its owner can read it; a file that a crash left does not matter, and a symlink stays one."""
    link = path.with_name("link")
    link.symlink_to(path)
    path.with_name("token.part").write_text("half")
    with closing(WatchTokenFile(link)) as file:
        assert file.read() == ""
        file.store("a")
        file.store("b")

    with closing(WatchTokenFile(path)) as file:
        assert file.read() == "b"
    assert (path.stat().st_mode & 0o777, link.is_symlink()) == (0o600, True)
    assert {each.name for each in path.parent.iterdir()} == {"token", "link"}


@pytest.mark.parametrize("stores", [True, False])
def test_is_for_one_process(path: Path, *, stores: bool) -> None:
    """Two watches would each store a position for changes that only the other one has written."""
    path.write_text("a\n")
    with closing(WatchTokenFile(path)) as file:
        file.read()
        if stores:
            file.store("b")

        with pytest.raises(UsageError, match="is in use by another process"):
            WatchTokenFile(path).read()
        with pytest.raises(UsageError, match="is in use by another process"):
            WatchTokenFile(path).lock()


@pytest.mark.parametrize("content", ["", "\n", "é"])
def test_refuses_a_file_without_a_token(path: Path, content: str) -> None:
    """To begin now without saying so would lose changes."""
    path.write_text(content)

    with closing(WatchTokenFile(path)) as file, pytest.raises(UsageError, match="contains no token; remove"):
        file.read()


def test_reports_why_it_can_not_be_used(path: Path) -> None:
    """A device would be replaced by a file."""
    with pytest.raises(UsageError, match="/dev/null is a device or a pipe"):
        WatchTokenFile(Path("/dev/null"))
    with pytest.raises(UsageError, match="can't be written: No such file or directory"):
        WatchTokenFile(path / "nowhere").store("a")
    path.write_text("a")
    with pytest.raises(UsageError, match="can't be read: Not a directory"):
        WatchTokenFile(path / "nowhere").read()


def test_an_export_without_a_token_is_refused(path: Path) -> None:
    """A copy that misses changes must not begin."""
    job = Export(USERS, None, token_file=WatchTokenFile(path))

    with pytest.raises(UsageError, match="export without that option"):
        job._store_token("")
    assert not path.exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["changes", "--entity", "loads"], "'loads' is not one of 'users', 'posts'"),
        (["changes", "rest"], "Got unexpected extra argument (rest)"),
        (["changes", "--watch-token-file", "/dev/null"], "is a device or a pipe; name a file"),
        (["changes", "reset", "--entity", "users"], "No such option '--entity'"),
        (["export", "users", "--after-id", "1", "--watch-token-file", "nosuch"], "keeps the token of its"),
    ],
)
def test_reports_wrong_arguments(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options of `watch` follow the name of the group directly."""
    monkeypatch.chdir(tmp_path)

    ended = CliRunner().invoke(main, words)

    assert ended.exit_code == 2
    assert expected in ended.output


def test_reset_needs_a_schema(tmp_path: Path) -> None:
    """A mistaken URL is not taken for a database whose feed was reset."""
    (tmp_path / "empty.db").touch()
    url = f"sqlite:///{tmp_path}/empty.db"

    ended = CliRunner().invoke(main, ["changes", "reset"], env={"ROSTER_DATABASE_URL": url})

    assert ended.exit_code == 2
    assert "run `roster migrate`" in ended.output


def test_lines_have_rows_as_exports_write_them() -> None:
    """An unset field is null, times are in UTC with microseconds; changes keep their order."""
    moment = Timestamp(seconds=NOON, nanos=1000)
    times: Any = {"created_at": Timestamp(seconds=NOON - 86_400), "updated_at": moment}
    users = [User(id=7, email="é@example.org", version=3, **times), User(id=5, full_name="", **times)]
    post = Post(id=9, title="a\nb", author_id=7, **times)
    found = [*(Change(user=user) for user in users), Change(post=post), Change(deleted_post_id=8)]
    found.append(Change(deleted_user_id=6))
    for change in found:
        change.changed_at.CopyFrom(moment)

    lines = change_lines(found).splitlines()

    at = {"changed_at": "2024-01-31T12:00:00.000001Z"}
    assert [json.loads(line) for line in lines] == [
        *({"user": row} | at for row in exported(users, "users")),
        *({"post": row} | at for row in exported([post], "posts")),
        {"deleted_post_id": 8} | at,
        {"deleted_user_id": 6} | at,
    ]


def exported(messages: Sequence[Message], name: str) -> list[Any]:
    """Return rows as `roster export` writes them."""
    file, entity = BytesIO(), ENTITIES[name]
    with WRITERS["ndjson"](file, entity) as write:
        write(columns_of(messages, entity.exported))
    return [json.loads(line) for line in file.getvalue().splitlines()]
