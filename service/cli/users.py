"""`roster users`: get, list, create, update, deactivate and delete single users."""

from collections.abc import Mapping
from typing import Any

import click
import grpc
import orjson

from roster.errors import PermissionDenied
from roster.v1 import users_pb2 as pb
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import CountPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2_grpc import UserServiceStub
from service.cli import posts
from service.cli.calls import (
    INPUT,
    NOTHING_WRITTEN,
    USER_KEY,
    check_not_created,
    check_not_updated,
    check_version,
    confirm_deletion,
    dry_delete_option,
    dry_run_option,
    find_user,
    json_option,
    list_options,
    print_list,
    read_secret,
    request_id_option,
    run,
    user_id,
    version_option,
    yes_option,
)
from service.cli.records import MOST_POSTS, Document, RowPrinter, document, print_record
from service.cli.rows import USERS
from service.cli.table import cut
from service.cli.terminal import NAME_WIDTH, Target, echo, pluralize, server_options
from service.escape import escape

LAYOUTS = (
    ("id", "email", "full_name", "is_active", "created_at", "updated_at", "version"),
    ("id", "email", "full_name", "is_active", "updated_at", "version"),
    ("id", "email", "full_name", "is_active", "updated_at"),
    ("id", "email", "full_name", "is_active"),
    ("id", "is_active", "email"),
)
PROSE = "full_name"
NULLABLE = ("full_name",)
OUTCOME = "roster-outcome"  # a header of the answer to CreateUser
OUTCOMES = {
    "created": "the user was created",
    "skipped": "the user exists, and was not changed",
    "updated": "the user exists, and was updated",
}
DRY_OUTCOMES = {
    "created": "the user would be created",
    "skipped": "the user exists, and would not be changed",
    "updated": "the user exists, and would be updated",
}

key_argument = click.argument("key", metavar="USER", type=USER_KEY)
FIELD_OPTIONS = (
    click.option("--full-name", help="At most 255 characters."),
    click.option(
        "--active/--inactive",
        "is_active",
        default=None,
        help="Whether the password is accepted; a new user is active.",
    ),
    click.option(
        "--password-file",
        "password",
        type=INPUT,
        help="File with the password, on one line; - asks for it, or reads standard input.",
    ),
    click.option(
        "--hashed-password-file",
        "hashed_password",
        type=INPUT,
        help="File with a hash of the password, as docs/security.md lists them; - is standard input.",
    ),
)


def field_options(command: Any) -> Any:
    """Add the options for the fields that create and update have in common."""
    for add in reversed(FIELD_OPTIONS):
        command = add(command)
    return command


@click.group()
@click.pass_context
def users(context: click.Context) -> None:
    """Get, list, create, update, deactivate or delete users.

    USER is an id, such as 42, or an e-mail. Times are in UTC. --json prints rows as `roster export` writes
    them. Passwords and their hashes are never printed.

    The exit status is 0 if the command worked; 1 if there is no such user, the e-mail is taken, the version
    is another one, or a deletion was not confirmed; otherwise 2, or 130 after Ctrl-C.
    """
    context.default_map = dict.fromkeys(users.commands, context.default_map)


@users.command()
@key_argument
@server_options
@click.option("--with-posts", is_flag=True, help=f"Print the newest {MOST_POSTS} posts too.")
@json_option
def get(key: Mapping[str, Any], target: Target, *, with_posts: bool, is_json: bool) -> None:
    """Print one user, by id or e-mail."""
    view = User.WITH_POSTS if with_posts else User.BASIC
    found = run(target, lambda connection: find_user(connection, key, view=view))
    print_record(_document(found, with_posts=with_posts and is_json), is_json=is_json)
    if with_posts and not is_json:
        _print_posts(found)


@users.command("list")
@server_options
@click.option("--with-posts", is_flag=True, help=f"Count the posts up to {MOST_POSTS}; --json prints them.")
@list_options
def list_(
    target: Target,
    filter_: str,
    order_by: str,
    limit: int,
    page_token: str,
    *,
    with_posts: bool,
    is_json: bool,
) -> None:
    """List users, ordered by id.

    For example: `roster users list --filter 'email = "*@example.org" AND is_active = false'`
    """

    async def make_request(connection: grpc.aio.Channel) -> tuple[Any, pb.ListUsersRequest]:
        request = pb.ListUsersRequest(
            filter=filter_,
            order_by=order_by,
            page_token=page_token,
            view=User.WITH_POSTS if with_posts else User.BASIC,
        )
        return UserServiceStub(connection).ListUsers, request

    layouts = [(*layout[:-1], "posts", layout[-1]) for layout in LAYOUTS] if with_posts else LAYOUTS
    printer = RowPrinter(layouts, PROSE, is_json=is_json)
    print_list(target, make_request, lambda user: _document(user, with_posts=with_posts), printer, limit)


@users.command()
@server_options
@click.option("--email", required=True, help="E-mail of the user; it is unique.")
@field_options
@click.option(
    "--on-conflict",
    type=click.Choice(["fail", "skip", "update"]),
    default="fail",
    show_default=True,
    help="If another user has the e-mail: fail, print that user, or update it with the other options.",
)
@dry_run_option
@request_id_option
@json_option
def create(
    target: Target, on_conflict: str, request_id: str, *, dry_run: bool, is_json: bool, **options: Any
) -> None:
    """Create a user, and print it. With --on-conflict, make sure that it exists.

    For example: `roster users create --email ada@example.org --full-name Ada --password-file -`
    """
    values = _values(options)
    request = pb.CreateUserRequest(
        user=User(**values),
        request_id=request_id,
        on_conflict=BulkOptions.OnConflict.Value(on_conflict.upper()),
        validate_only=dry_run,
    )
    if on_conflict == "update":
        request.update_mask.paths.extend(name for name in values if name != "email")
        if not request.update_mask.paths:
            raise click.UsageError("--on-conflict update needs something to change, such as --full-name")

    async def work(connection: grpc.aio.Channel) -> tuple[User, str]:
        created, outcome = await _create(connection, request)
        if dry_run and outcome == "updated":
            await check_not_updated(created, lambda: find_user(connection, {"id": created.id}))
        elif dry_run and outcome != "skipped":
            check_not_created(created)
        return created, outcome

    created, outcome = run(target, work)
    print_record(_document(created), is_json=is_json)
    outcomes = DRY_OUTCOMES if dry_run else OUTCOMES
    if on_conflict != "fail" and outcome in outcomes:
        echo(outcomes[outcome], err=True)
    if dry_run:
        echo(NOTHING_WRITTEN, err=True)


@users.command()
@key_argument
@server_options
@click.option("--email", help="The new e-mail.")
@field_options
@click.option("--clear", type=click.Choice(NULLABLE), multiple=True, help="Set a field to null.")
@version_option
@dry_run_option
@request_id_option
@json_option
def update(
    key: Mapping[str, Any],
    target: Target,
    clear: tuple[str, ...],
    version: int | None,
    request_id: str,
    *,
    dry_run: bool,
    is_json: bool,
    **options: Any,
) -> None:
    """Change fields of a user, and print it. Other fields stay as they are.

    For example: `roster users update 42 --email ada@example.org --clear full_name --version 3`
    """
    values = _values(options)
    if both := [name for name in clear if name in values]:
        raise click.UsageError(f"--clear {both[0]} and --{both[0].replace('_', '-')} contradict each other")
    if not (values or clear):
        raise click.UsageError("there is nothing to change; pass an option such as --full-name or --inactive")
    request = pb.UpdateUserRequest(user=User(**values), request_id=request_id, validate_only=dry_run)
    request.update_mask.paths.extend((*values, *clear))

    async def work(connection: grpc.aio.Channel) -> User:
        request.user.id, request.user.version = await user_id(connection, key), version or 0
        updated = await UserServiceStub(connection).UpdateUser(request)
        if dry_run:
            await check_not_updated(updated, lambda: find_user(connection, {"id": updated.id}))
        return updated

    print_record(_document(run(target, work)), is_json=is_json)
    if dry_run:
        echo(NOTHING_WRITTEN, err=True)


@users.command(short_help="Deactivate a user, and print it.")
@key_argument
@server_options
@version_option
@click.option(
    "--dry-run", is_flag=True, help="Write nothing, and print what the answer would be. It only reads."
)
@json_option
def deactivate(
    key: Mapping[str, Any], target: Target, version: int | None, *, dry_run: bool, is_json: bool
) -> None:
    """Deactivate a user, and print it. An inactive user keeps all data, but fails each check of the password.

    This reads the user first, and fails if somebody else changes it meanwhile. `roster users update USER
    --active` activates it again.
    """

    async def work(connection: grpc.aio.Channel) -> tuple[User, bool]:
        found = await find_user(connection, key)
        check_version(found, version)
        if not found.is_active:
            return found, False
        if dry_run:
            found.is_active, found.version = False, found.version + 1
            found.ClearField("updated_at")
            return found, True
        user = User(id=found.id, version=found.version, is_active=False)
        return await UserServiceStub(connection).UpdateUser(pb.UpdateUserRequest(user=user)), True

    user, has_changed = run(target, work)
    print_record(_document(user), is_json=is_json)
    if not has_changed:
        echo("the user is already inactive; nothing was changed", err=True)
    elif dry_run:
        echo("the user would be deactivated", NOTHING_WRITTEN, err=True)


@users.command()
@key_argument
@server_options
@version_option
@yes_option
@dry_delete_option
@request_id_option
@json_option
def delete(
    key: Mapping[str, Any],
    target: Target,
    version: int | None,
    request_id: str,
    *,
    yes: bool,
    dry_run: bool,
    is_json: bool,
) -> None:
    """Delete a user with all posts, after showing both. Only --yes skips the question."""
    id = key.get("id")
    if dry_run or not (yes and id):
        user, number = run(target, lambda connection: _find_with_posts(connection, key, version))
        id, version = user.id, user.version
        if dry_run:
            print_record(_document(user), is_json=is_json)
            echo(f"user {id} and {number} would be deleted", NOTHING_WRITTEN, err=True)
            return
        if not yes:
            name = f", {cut(escape(user.full_name), NAME_WIDTH)}" if user.full_name else ""
            confirm_deletion(f"user {id} ({escape(user.email)}{name}) and {number}")
    request = pb.DeleteUserRequest(id=id, version=version or 0, request_id=request_id)
    run(target, lambda connection: UserServiceStub(connection).DeleteUser(request))
    if is_json:
        echo(orjson.dumps({"deleted_user_id": id}).decode())
    else:
        echo(f"deleted user {id} and all posts of the user")


def _document(user: User, *, with_posts: bool = False) -> Document:
    listed = {"posts": [document(post, posts.LISTED) for post in user.posts]} if with_posts else {}
    return document(user, USERS.exported) | listed


def _print_posts(user: User) -> None:
    if not user.posts:
        echo("the user has no posts", err=True)
        return
    echo("")
    printer = RowPrinter(posts.LAYOUTS, posts.PROSE, is_json=False)
    printer.add([document(post, posts.LISTED) for post in user.posts])
    printer.end()
    if len(user.posts) == MOST_POSTS:
        echo(f"these are the newest; `roster posts list --author {user.id}` lists all", err=True)


def _values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that options set. Passwords come from files: anybody can read arguments in `ps`."""
    if options["password"] and options["hashed_password"]:
        raise click.UsageError("--password-file and --hashed-password-file are both passwords; pass one")
    secrets = {
        "password": read_secret(options["password"], "--password-file", "Password"),
        "hashed_password": read_secret(options["hashed_password"], "--hashed-password-file", "Hash"),
    }
    return {name: value for name, value in {**options, **secrets}.items() if value is not None}


async def _create(connection: grpc.aio.Channel, request: pb.CreateUserRequest) -> tuple[User, str]:
    """Return the user, and what was done; "" if that is not known."""
    call = UserServiceStub(connection).CreateUser(request)
    user = await call
    headers = dict(await call.initial_metadata() or ())
    return user, str(headers.get(OUTCOME, ""))


async def _find_with_posts(
    connection: grpc.aio.Channel, key: Mapping[str, Any], version: int | None
) -> tuple[User, str]:
    """Return a user, and in words how many posts would be deleted too; raises RosterError."""
    user = await find_user(connection, key)
    check_version(user, version)
    try:
        counted = await PostServiceStub(connection).CountPosts(CountPostsRequest(author_id=user.id))
    except PermissionDenied:
        return user, "all posts of the user"
    at_least = "" if counted.is_exact else "more than "
    return user, at_least + pluralize(counted.count, "post")
