"""Shared by `roster users` and `roster posts`: arguments, options, calls and their errors, and lists."""

import asyncio
import re
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

import click
import grpc
from google.protobuf.message import Message

from roster.client import DeadlineExceeded
from roster.errors import (
    Aborted,
    AlreadyExists,
    EmailTaken,
    FailedPrecondition,
    InvalidField,
    InvalidFilter,
    NotFound,
    OutcomeUnknown,
    PermissionDenied,
    PostNotFound,
    RosterError,
    UserNotFound,
    VersionMismatch,
)
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.cli.records import Document, RowPrinter
from service.cli.terminal import PAGE_SIZE, Integer, Target, UsageError, confirm, echo
from service.validation import MAX_ID

ResultT = TypeVar("ResultT")
Work = Callable[[grpc.aio.Channel], Awaitable[ResultT]]

STDIN = "-"
DEFAULT_LIMIT = 50
SELECTION = ("filter_", "order_by", "author")  # to which a page token belongs
MAX_INPUT = 1 << 20  # bytes; the limit of `Post.content`
ID_DIGITS = len(str(MAX_ID))
# These depend on the stored rows: a script may expect them.
CONFLICTS = (NotFound, AlreadyExists, FailedPrecondition, Aborted)
NOTHING_WRITTEN = "dry run: nothing was written"
# Of the API -> of a command line.
WORDS = {
    "next_page_token": "the token that a list ended with",
    "page_token": "--page-token",
    "order_by": "--order-by",
    "request_id": "--request-id",
}
WORDS_OF_API = re.compile(rf"\b({'|'.join(WORDS)})\b")

ID = Integer(1, MAX_ID)
INPUT = click.Path(exists=True, dir_okay=False, allow_dash=True)


class UserKeyType(click.ParamType[Mapping[str, Any]]):
    """An id or an e-mail, as the field of a request. Digits are an id; an e-mail has an @."""

    name = "user"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Mapping[str, Any]:
        """Return `{"id": …}` or `{"email": …}`."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]  # Click converts values again
        text = value.strip()
        if "@" in text:
            return {"email": text}
        if not (text.isascii() and text.isdecimal()):
            self.fail(f"{value!r} is neither an id nor an e-mail", param, ctx)
        if len(text) > ID_DIGITS or not 1 <= int(text) <= MAX_ID:
            self.fail(f"an id is from 1 to {MAX_ID}", param, ctx)
        return {"id": int(text)}


USER_KEY = UserKeyType()

json_option = click.option("--json", "is_json", is_flag=True, help="Print JSON, one object per line.")
version_option = click.option(
    "--version",
    type=Integer(1),
    help="Fail if this is not the current version, so that no other change is overwritten.",
)
dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check everything, write nothing, and print what the answer would be."
)
request_id_option = click.option(
    "--request-id",
    default="",
    help="A UUID. The same command, repeated with it within 24 hours, is applied once.",
)
yes_option = click.option("--yes", is_flag=True, help="Delete without asking.")
dry_delete_option = click.option(
    "--dry-run", is_flag=True, help="Delete nothing, and print what would be deleted. It only reads."
)
LIST_OPTIONS = (
    click.option("--filter", "filter_", default="", help="List only matching rows; see docs/filtering.md."),
    click.option("--order-by", default="", help="A field, then asc or desc, such as 'created_at desc'."),
    click.option(
        "--limit",
        type=Integer(0),
        default=DEFAULT_LIMIT,
        show_default=True,
        help="List at most this many rows; 0 lists all.",
    ),
    click.option("--page-token", default="", help="Continue a list at the token that it ended with."),
    json_option,
)


def list_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all lists have."""
    for add in reversed(LIST_OPTIONS):
        command = add(command)
    return command


class Conflict(UsageError):
    """A call that the stored rows did not allow, with exit status 1."""

    exit_code = 1


def run(target: Target, work: Work[ResultT]) -> ResultT:
    """Return the result of calls over a channel; raises UsageError, and Conflict for a state of the rows."""

    async def connect() -> ResultT:
        async with target.channel() as connection:
            return await work(connection)

    try:
        return asyncio.run(connect())
    except RosterError as failure:
        kind = Conflict if isinstance(failure, CONFLICTS) else UsageError
        raise kind(_explain(target, failure)) from None


def _explain(target: Target, failure: RosterError) -> str:
    """Return the message of a failed call, in the words of the command's options."""
    if isinstance(failure, VersionMismatch):
        current = failure.facts.get("version")
        return f"version is now {current}; run `{_get_command()}`, then repeat this with --version {current}"
    if isinstance(failure, UserNotFound | PostNotFound):
        noun = "post" if isinstance(failure, PostNotFound) else "user"
        return describe_missing(noun, click.get_current_context().params["key"])
    if isinstance(failure, EmailTaken):
        return _explain_taken_email(failure)
    message = target.explain(failure)
    if not isinstance(failure, InvalidFilter):  # which repeats words of the filter
        message = WORDS_OF_API.sub(lambda found: WORDS[found[0]], message)
    option = _option_of(failure.field)
    if option and message.startswith(f"{failure.field} "):
        message = f"{option}{message.removeprefix(failure.field)}"
    elif option and option not in message:
        message = f"{option}: {message}"
    if isinstance(failure, DeadlineExceeded | OutcomeUnknown) and "request_id" in failure.facts:
        message += (
            "; it may have been applied: repeat the command with --request-id "
            f"{failure.facts['request_id']}, which does not apply it twice"
        )
    return message


def _explain_taken_email(failure: EmailTaken) -> str:
    options = click.get_current_context().params
    message = f"the e-mail {options['email']} belongs to another user"
    existing = failure.facts.get("existing_id")  # if the caller may know it
    if existing:
        message += f", whose id is {existing}"
    if "on_conflict" in options:
        key = existing or quote(str(options["email"]))
        message += f"; pass --on-conflict skip or update, or run `roster users update {key}`"
    return message


def _option_of(field: str) -> str:
    """Return the option of the current command that sets a field of a request, "" if there is none."""
    name = field.rpartition(".")[2]
    for parameter in click.get_current_context().command.params:
        if isinstance(parameter, click.Option) and (parameter.name or "").rstrip("_") == name:
            return parameter.opts[0]
    return ""


def describe_missing(noun: str, key: Mapping[str, Any] | int) -> str:
    """Return a sentence about a row that does not exist, with the id or e-mail that was looked for."""
    fields = key if isinstance(key, Mapping) else {"id": key}
    return (
        f"{noun} {fields['id']} does not exist" if "id" in fields else f"there is no {noun} {fields['email']}"
    )


def _get_command() -> str:
    """Return the command that shows the row of the current one."""
    context = click.get_current_context()
    group, key = context.parent, context.params["key"]
    [name] = key.values() if isinstance(key, Mapping) else [key]
    return f"{group.command_path if group else 'roster'} get {quote(str(name))}"


async def find_user(connection: grpc.aio.Channel, key: Mapping[str, Any], **fields: Any) -> User:
    """Return the user that an argument identifies; raises RosterError."""
    try:
        return await UserServiceStub(connection).GetUser(GetUserRequest(**key, **fields))
    except InvalidField as error:  # of the argument, not of an option with the same name
        [value] = key.values()
        raise UsageError(f"{value!r}: {error.message}") from None
    except NotFound:
        raise Conflict(describe_missing("user", key)) from None


async def check_author(connection: grpc.aio.Channel, key: Mapping[str, Any]) -> None:
    """Raise Conflict if there is no such user; without the right to get users, this can't be checked."""
    with suppress(PermissionDenied):
        await find_user(connection, key)


async def user_id(connection: grpc.aio.Channel, key: Mapping[str, Any]) -> int:
    """Return the id of a user, looked up only if the argument is an e-mail; raises RosterError."""
    id: int | None = key.get("id")
    return id or (await find_user(connection, key)).id


def print_list(
    target: Target,
    make_request: Callable[[grpc.aio.Channel], Awaitable[tuple[Any, Any]]],
    to_document: Callable[[Any], Document],
    printer: RowPrinter,
    limit: int,
    check_if_empty: Work[Any] | None = None,
) -> None:
    """Print the rows of a List RPC, at most `limit`, 0 for all; raises UsageError.

    `make_request` returns the RPC and its request. `check_if_empty` runs if there are no rows. Standard
    error says if there are none, or more.
    """

    async def work(connection: grpc.aio.Channel) -> str:
        token, is_empty = "", True
        async with aclosing(_pages(*await make_request(connection), limit)) as pages:
            async for rows, next_token in pages:
                printer.add([to_document(row) for row in rows])
                token, is_empty = next_token, is_empty and not rows
        if is_empty and check_if_empty:
            await check_if_empty(connection)
        return token

    token = run(target, work)
    printer.end()
    if not printer.printed:
        echo("no rows found", err=True)
    elif token:
        same = _repeated_options()
        hint = f"list all with --limit 0, or the next ones with {same}--page-token {token}"
        echo(f"there are more: {hint}", err=True)


def _repeated_options() -> str:
    """Return which options the next page of the current list needs again."""
    context = click.get_current_context()
    options = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name in SELECTION and context.params[parameter.name]
    ]
    return f"the same {', '.join(options)} and " if options else ""


async def _pages(
    method: Callable[[Any], Awaitable[Message]], request: Any, limit: int
) -> AsyncGenerator[tuple[list[Any], str]]:
    """Yield the rows of each page, with the token of the next page."""
    remaining = limit or sys.maxsize
    while remaining > 0:
        request.page_size = min(remaining, PAGE_SIZE)
        page: Any = await method(request)
        [rows] = (getattr(page, field.name) for field in page.DESCRIPTOR.fields if field.is_repeated)
        yield [*rows], page.next_page_token
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
        remaining -= len(rows)


def read_text(path: str | None, option: str) -> str | None:
    """Return the text of a file, or of standard input for `-`; None without a path. Raises UsageError."""
    if path is None:
        return None
    try:
        if path == STDIN:
            if sys.stdin.isatty():
                echo(f"{option}: reading the terminal until Ctrl-D on an empty line", err=True)
            data = sys.stdin.buffer.read(MAX_INPUT + 1)
        else:
            with Path(path).open("rb") as file:
                data = file.read(MAX_INPUT + 1)
    except OSError as error:
        raise UsageError(f"{option} {path} can't be read: {error.strerror}") from None
    if len(data) > MAX_INPUT:
        raise UsageError(f"{option} {path} has more than {MAX_INPUT:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UsageError(f"{option} {path} is not UTF-8") from None


def read_secret(path: str | None, option: str, title: str) -> str | None:
    """Return the first line of a file, or ask for it if `-` is a terminal; raises UsageError."""
    if path == STDIN and sys.stdin.isatty():
        return str(click.prompt(title, hide_input=True, confirmation_prompt=True, err=True))
    text = read_text(path, option)
    if text is None:
        return None
    secret = text.removesuffix("\n").removesuffix("\r")
    if not secret or "\n" in secret:
        raise UsageError(f"{option} {path} has {'more than one line' if secret else 'no text'}")
    return secret


def check_not_created(row: Any) -> None:
    """Check the answer to the dry run of a create; raises UsageError if the server has created the row."""
    if row.id:
        raise _wrote_in_spite_of_dry_run("created", row)


async def check_not_updated(row: Any, read: Callable[[], Awaitable[Any]]) -> None:
    """Check the answer to the dry run of an update; raises UsageError if the server has updated the row.

    An update raises the version, so the stored row has that of the answer only if it was written. The time
    excludes an update by others. Without the right to read rows, this can't be checked.
    """
    try:
        stored = await read()
    except (PermissionDenied, NotFound, Conflict):
        return
    if (stored.version, stored.updated_at) == (row.version, row.updated_at):
        raise _wrote_in_spite_of_dry_run("updated", row)


def _wrote_in_spite_of_dry_run(done: str, row: Any) -> UsageError:
    return UsageError(
        f"the server is of a release that does not know --dry-run, and has {done} "
        f"{row.DESCRIPTOR.name.lower()} {row.id}"
    )


def check_version(row: Any, version: int | None) -> None:
    """Raise VersionMismatch if a row does not have the version of the option, as a write does."""
    if version and version != row.version:
        raise VersionMismatch.of(row.version)


def confirm_deletion(rows: str) -> None:
    """Ask at the terminal whether to delete rows; raises Conflict if not, UsageError without a terminal."""
    if not sys.stdin.isatty():
        raise UsageError(
            "nothing was deleted: standard input is not a terminal, so nobody can be asked; --yes deletes "
            f"{rows}"
        )
    if not confirm(f"Delete {rows}? This can't be undone."):
        raise Conflict("this was not confirmed, and nothing was deleted")
