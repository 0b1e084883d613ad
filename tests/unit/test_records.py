"""What `roster users` and `roster posts` print about rows and errors, without a server."""

import click
import pytest
from click.testing import CliRunner
from google.protobuf.timestamp_pb2 import Timestamp

from roster.client import DeadlineExceeded
from roster.errors import InvalidField, PermissionDenied, RosterError
from roster.v1.resources_pb2 import Post, User
from service.cli.calls import run
from service.cli.records import document, print_record
from service.cli.rows import POSTS, USERS
from service.cli.terminal import Target

CREATED = Timestamp(seconds=1_767_225_600, nanos=1000)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            User(id=1, email="a@b.org", full_name="", is_active=False, created_at=CREATED, version=2),
            (1, "a@b.org", "", False, "2026-01-01T00:00:00.000001Z", None, 2),
        ),
        (User(version=1), (None, None, None, None, None, None, 1)),
        (Post(id=7, title="Notes", content=""), (7, "Notes", "", None, None, None, None)),
    ],
)
def test_unset_fields_are_null(message: User | Post, expected: tuple[object, ...]) -> None:
    """Those of a dry run, and of an update by a caller who may not read; empty texts are texts."""
    names = (USERS if isinstance(message, User) else POSTS).exported

    assert tuple(document(message, names).values()) == expected


def test_no_text_looks_like_another_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of a text are indented, and nothing in them controls a terminal."""
    print_record({"id": 1, "title": "a\nid  2\r\n\x1b[2J", "version": None}, is_json=False)

    assert capsys.readouterr().out.splitlines() == [
        "id       1",
        "title    a",
        "         id  2",
        r"         \u001b[2J",
        "version",
    ]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (InvalidField("user.full_name is longer", field="user.full_name"), "--full-name is longer"),
        (
            InvalidField("at character 3: expected a value", field="filter"),
            "--filter: at character 3: expected",
        ),
        (InvalidField("user.email is required", field="user.email"), "user.email is required"),
        (PermissionDenied("the caller has no role that allows this"), "the caller has no role"),
        (
            DeadlineExceeded("no answer", request_id="7d0f"),
            "repeat the command with --request-id 7d0f, which",
        ),
    ],
)
def test_errors_name_options(failure: RosterError, expected: str) -> None:
    """The option is that of the field at fault, if the command has one."""

    async def fail(_: object) -> None:
        raise failure

    @click.command()
    @click.option("--full-name")
    @click.option("--filter", "filter_")
    def command(**_: str) -> None:
        run(Target("127.0.0.1:1", None, None, None, None, None, None, insecure_token=False), fail)

    done = CliRunner().invoke(command)

    assert (done.exit_code, done.stdout) == (2, "")
    assert expected in done.stderr
