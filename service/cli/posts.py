"""`roster posts`: get, list, create, update and delete single posts."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import click
import grpc
import orjson

from roster.errors import AuthorNotFound
from roster.v1 import posts_pb2 as pb
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post
from service.cli.calls import (
    ID,
    INPUT,
    NOTHING_WRITTEN,
    USER_KEY,
    Conflict,
    check_author,
    check_not_created,
    check_not_updated,
    check_version,
    confirm_deletion,
    describe_missing,
    dry_delete_option,
    dry_run_option,
    json_option,
    list_options,
    print_list,
    read_text,
    request_id_option,
    run,
    user_id,
    version_option,
    yes_option,
)
from service.cli.records import Document, RowPrinter, document, print_record
from service.cli.rows import POSTS, USERS
from service.cli.table import cut
from service.cli.terminal import NAME_WIDTH, Target, echo, server_options
from service.escape import escape

LAYOUTS = (
    ("id", "author_id", "title", "created_at", "updated_at", "version"),
    ("id", "author_id", "title", "updated_at", "version"),
    ("id", "author_id", "title", "updated_at"),
    ("id", "author_id", "title"),
    ("id", "title"),
)
PROSE = "title"
WITH_AUTHOR = "Print the author too."
# In `User.posts`.
LISTED = tuple(name for name in POSTS.exported if name != "content")

title_option = click.option("--title", help="At most 255 characters.")
content_option = click.option(
    "--content-file", "content", type=INPUT, help="File with the content; - is standard input."
)


@click.group()
@click.pass_context
def posts(context: click.Context) -> None:
    """Get, list, create, update or delete posts.

    Times are in UTC. --json prints rows as `roster export` writes them. `roster users delete` deletes the
    posts of a user too.

    The exit status is 0 if the command worked; 1 if there is no such post or author, the version is another
    one, or a deletion was not confirmed; otherwise 2, or 130 after Ctrl-C.
    """
    context.default_map = dict.fromkeys(posts.commands, context.default_map)


@posts.command()
@click.argument("key", metavar="POST_ID", type=ID)
@server_options
@click.option("--with-author", is_flag=True, help=WITH_AUTHOR)
@json_option
def get(key: int, target: Target, *, with_author: bool, is_json: bool) -> None:
    """Print one post, by id, with its content."""
    found = run(target, lambda connection: _find(connection, key, with_author=with_author))
    print_record(_document(found, with_author=with_author), is_json=is_json)


@posts.command("list")
@server_options
@click.option("--author", type=USER_KEY, help="Only the posts of this user: an id or an e-mail.")
@click.option("--with-author", is_flag=True, help=WITH_AUTHOR)
@list_options
def list_(
    target: Target,
    author: Mapping[str, Any] | None,
    filter_: str,
    order_by: str,
    limit: int,
    page_token: str,
    *,
    with_author: bool,
    is_json: bool,
) -> None:
    """List posts, ordered by id. Only --json prints their content.

    For example, the newest posts of a user: `roster posts list --author ada@example.org --order-by
    'created_at desc'`
    """

    async def make_request(connection: grpc.aio.Channel) -> tuple[Any, pb.ListPostsRequest]:
        request = pb.ListPostsRequest(
            filter=filter_,
            order_by=order_by,
            page_token=page_token,
            view=Post.WITH_AUTHOR if with_author else Post.BASIC,
            author_id=await user_id(connection, author) if author else 0,
        )
        return PostServiceStub(connection).ListPosts, request

    printer = RowPrinter(_layouts(with_author=with_author), PROSE, is_json=is_json)
    print_list(
        target,
        make_request,
        lambda post: _document(post, with_author=with_author),
        printer,
        limit,
        check_if_empty=partial(check_author, key=author) if author else None,
    )


@posts.command()
@server_options
@click.option("--author", type=USER_KEY, required=True, help="The author: an id or an e-mail.")
@title_option
@content_option
@dry_run_option
@request_id_option
@json_option
def create(
    target: Target,
    author: Mapping[str, Any],
    title: str | None,
    content: str | None,
    request_id: str,
    *,
    dry_run: bool,
    is_json: bool,
) -> None:
    """Create a post, and print it.

    For example: `roster posts create --author ada@example.org --title Notes --content-file notes.txt`
    """
    text = read_text(content, "--content-file")

    async def work(connection: grpc.aio.Channel) -> Post:
        post = Post(author_id=await user_id(connection, author), title=title or "", content=text)
        request = pb.CreatePostRequest(post=post, request_id=request_id, validate_only=dry_run)
        try:
            created = await PostServiceStub(connection).CreatePost(request)
        except AuthorNotFound:
            raise Conflict(describe_missing("user", author)) from None
        if dry_run:
            check_not_created(created)
        return created

    print_record(_document(run(target, work)), is_json=is_json)
    if dry_run:
        echo(NOTHING_WRITTEN, err=True)


@posts.command()
@click.argument("key", metavar="POST_ID", type=ID)
@server_options
@title_option
@content_option
@version_option
@dry_run_option
@request_id_option
@json_option
def update(
    key: int,
    target: Target,
    title: str | None,
    content: str | None,
    version: int | None,
    request_id: str,
    *,
    dry_run: bool,
    is_json: bool,
) -> None:
    """Change the title or the content of a post, and print it. An empty file empties the content."""
    values = {"title": title, "content": read_text(content, "--content-file")}
    changes = {name: value for name, value in values.items() if value is not None}
    if not changes:
        raise click.UsageError("there is nothing to change; pass --title or --content-file")
    post = Post(id=key, version=version, **changes)  # type: ignore[arg-type]  # texts, by name
    request = pb.UpdatePostRequest(post=post, request_id=request_id, validate_only=dry_run)
    request.update_mask.paths.extend(changes)

    async def work(connection: grpc.aio.Channel) -> Post:
        updated = await PostServiceStub(connection).UpdatePost(request)
        if dry_run:
            await check_not_updated(updated, lambda: _find(connection, key))
        return updated

    print_record(_document(run(target, work)), is_json=is_json)
    if dry_run:
        echo(NOTHING_WRITTEN, err=True)


@posts.command()
@click.argument("key", metavar="POST_ID", type=ID)
@server_options
@version_option
@yes_option
@dry_delete_option
@request_id_option
@json_option
def delete(
    key: int, target: Target, version: int | None, request_id: str, *, yes: bool, dry_run: bool, is_json: bool
) -> None:
    """Delete a post, after showing it. Only --yes skips the question."""

    async def find(connection: grpc.aio.Channel) -> Post:
        found = await _find(connection, key)
        check_version(found, version)
        return found

    if dry_run:
        print_record(_document(run(target, find)), is_json=is_json)
        echo(f"post {key} would be deleted", NOTHING_WRITTEN, err=True)
        return
    if not yes:
        found = run(target, find)
        confirm_deletion(f"post {key} by user {found.author_id}, “{cut(escape(found.title), NAME_WIDTH)}”")
        version = found.version
    request = pb.DeletePostRequest(id=key, version=version or 0, request_id=request_id)
    run(target, lambda connection: PostServiceStub(connection).DeletePost(request))
    if is_json:
        echo(orjson.dumps({"deleted_post_id": key}).decode())
    else:
        echo(f"deleted post {key}")


async def _find(connection: grpc.aio.Channel, id: int, *, with_author: bool = False) -> Post:
    view = Post.WITH_AUTHOR if with_author else Post.BASIC
    return await PostServiceStub(connection).GetPost(pb.GetPostRequest(id=id, view=view))


def _document(post: Post, *, with_author: bool = False) -> Document:
    author = {"author": document(post.author, USERS.exported)} if with_author else {}
    return document(post, POSTS.exported) | author


def _layouts(*, with_author: bool) -> Sequence[Sequence[str]]:
    """Return the layouts of a table; `author` is in place of `author_id`, because it is longer."""
    if not with_author:
        return LAYOUTS
    return [[name.replace("author_id", "author") for name in layout] for layout in LAYOUTS]
