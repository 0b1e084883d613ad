"""Roster's own checks of each request: the functions that its servicers call before they ask the database."""

from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

from google.protobuf.message import Message

from roster.errors import RosterError, TooLarge
from roster.v1 import bulk_pb2, changes_pb2, posts_pb2, users_pb2
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import Post, User
from service.auth.caller import Caller, set_caller
from service.bulk.operation import Operation, StreamOptions
from service.bulk.stream import open_load
from service.changes.servicer import _entities
from service.db.filters import parse_order
from service.db.paging import page_size
from service.db.repository import Repository
from service.idempotency import request_id_from_text
from service.loads.rules import check_load_id, check_new_load_id, check_owner
from service.posts.convert import author_id_from_request, post_from_message, post_update_from_request
from service.posts.repository import PostRepository
from service.posts.servicer import CREATE_POSTS, DELETE_POSTS, UPDATE_POSTS
from service.services import RPCS
from service.users.convert import (
    keys_from_request,
    password_from_request,
    user_creation_from_request,
    user_update_from_request,
)
from service.users.repository import UserRepository
from service.users.servicer import CREATE_USERS, DELETE_USERS, UPDATE_USERS
from service.validation import check_choice, check_id, check_ids
from service.wire import at_most_from_request, deletion_from_request, export_from_request

ADMIN = Caller("jwt:ada", frozenset({"admin"}), frozenset(RPCS))


def _create_user(request: Any) -> None:
    request_id_from_text(request.request_id)
    user_creation_from_request(request)


def _get_user(request: Any) -> None:
    keys_from_request(request)
    check_choice(request.view, User.View, "view")


def _batch_get(view: Any) -> Callable[[Any], None]:
    def check(request: Any) -> None:
        check_ids(request.ids)
        check_choice(request.view, view, "view")

    return check


def _list(repository: type[Repository[Any, Any]], view: Any) -> Callable[[Any], Awaitable[None]]:
    async def check(request: Any) -> None:
        page_size(request.page_size)
        check_choice(request.view, view, "view")
        if hasattr(request, "author_id"):
            author_id_from_request(request)
        parse_order(request.order_by, repository.sortable)
        await repository.conditions(request.filter)

    return check


def _update_user(request: Any) -> None:
    request_id_from_text(request.request_id)
    user_update_from_request(request)


def _delete(request: Any) -> None:
    request_id_from_text(request.request_id)
    deletion_from_request(request)


def _verify_password(request: Any) -> None:
    keys_from_request(request)
    password_from_request(request)


def _count(repository: type[Repository[Any, Any]]) -> Callable[[Any], Awaitable[None]]:
    async def check(request: Any) -> None:
        at_most_from_request(request)
        if hasattr(request, "author_id"):
            author_id_from_request(request)
        await repository.conditions(request.filter)

    return check


def _export(repository: type[Repository[Any, Any]]) -> Callable[[Any], Awaitable[None]]:
    async def check(request: Any) -> None:
        export_from_request(request)
        await repository.conditions(request.filter)

    return check


def _create_post(request: Any) -> None:
    request_id_from_text(request.request_id)
    post_from_message(request.post)


def _get_post(request: Any) -> None:
    check_id(request.id)
    check_choice(request.view, Post.View, "view")


def _update_post(request: Any) -> None:
    request_id_from_text(request.request_id)
    post_update_from_request(request)


def _bulk(operation: Operation) -> Callable[[Any], Awaitable[None]]:
    async def check(request: Any) -> None:
        message = operation.parser.parse(request.SerializeToString())
        if message.is_too_large:
            raise TooLarge("too many rows")
        options = StreamOptions.from_message(request.options, operation)
        if request.options.load_id:
            check_new_load_id(request.options.load_id)
        dry_run = BulkOptions()
        dry_run.CopyFrom(request.options)
        dry_run.validate_only = True  # so that it needs no database
        await open_load(None, operation, dry_run, ADMIN)  # type: ignore[arg-type]
        batch = await operation.batch(getattr(request, operation.rows_field), options.write)
        for failure in batch.failures.values():
            raise failure

    return check


def _load(request: Any) -> None:
    check_owner(request.caller, ADMIN)
    check_load_id(request.load_id)
    if hasattr(request, "page_size"):
        page_size(request.page_size)


def _list_loads(request: Any) -> None:
    check_owner(request.caller, ADMIN)
    page_size(request.page_size)


def _changes(request: Any) -> None:
    _entities(request.entities)
    if hasattr(request, "page_size"):
        page_size(request.page_size)


CHECKS: dict[type[Message], Callable[[Any], Awaitable[None] | None]] = {
    users_pb2.CreateUserRequest: _create_user,
    users_pb2.GetUserRequest: _get_user,
    users_pb2.BatchGetUsersRequest: _batch_get(User.View),
    users_pb2.ListUsersRequest: _list(UserRepository, User.View),
    users_pb2.UpdateUserRequest: _update_user,
    users_pb2.DeleteUserRequest: _delete,
    users_pb2.VerifyPasswordRequest: _verify_password,
    users_pb2.BulkCreateUsersRequest: _bulk(CREATE_USERS),
    users_pb2.BulkUpdateUsersRequest: _bulk(UPDATE_USERS),
    users_pb2.BulkDeleteUsersRequest: _bulk(DELETE_USERS),
    users_pb2.CountUsersRequest: _count(UserRepository),
    users_pb2.ExportUsersRequest: _export(UserRepository),
    posts_pb2.CreatePostRequest: _create_post,
    posts_pb2.GetPostRequest: _get_post,
    posts_pb2.BatchGetPostsRequest: _batch_get(Post.View),
    posts_pb2.ListPostsRequest: _list(PostRepository, Post.View),
    posts_pb2.UpdatePostRequest: _update_post,
    posts_pb2.DeletePostRequest: _delete,
    posts_pb2.BulkCreatePostsRequest: _bulk(CREATE_POSTS),
    posts_pb2.BulkUpdatePostsRequest: _bulk(UPDATE_POSTS),
    posts_pb2.BulkDeletePostsRequest: _bulk(DELETE_POSTS),
    posts_pb2.CountPostsRequest: _count(PostRepository),
    posts_pb2.ExportPostsRequest: _export(PostRepository),
    bulk_pb2.GetBulkLoadRequest: _load,
    bulk_pb2.ListBulkLoadsRequest: _list_loads,
    bulk_pb2.ListBulkLoadFailuresRequest: _load,
    bulk_pb2.ListBulkLoadRowsRequest: _load,
    bulk_pb2.AbortBulkLoadRequest: _load,
    changes_pb2.WatchChangesRequest: _changes,
    changes_pb2.ListChangesRequest: _changes,
}

USER, POST = {"id": 7, "full_name": "Ada"}, {"id": 7, "title": "Notes"}


# Valid requests of each kind, with the fields that are required, and few others.
VALID: dict[type[Message], dict[str, Any]] = {
    users_pb2.CreateUserRequest: {"user": {"email": "ada@example.org"}},
    users_pb2.GetUserRequest: {"id": 7},
    users_pb2.BatchGetUsersRequest: {"ids": [7]},
    users_pb2.UpdateUserRequest: {"user": USER},
    users_pb2.DeleteUserRequest: {"id": 7},
    users_pb2.VerifyPasswordRequest: {"id": 7, "password": "secret"},
    users_pb2.BulkCreateUsersRequest: {"users": [{"email": "ada@example.org"}]},
    users_pb2.BulkUpdateUsersRequest: {"options": {"update_mask": {"paths": ["full_name"]}}, "users": [USER]},
    users_pb2.BulkDeleteUsersRequest: {"users": [{"id": 7}]},
    users_pb2.ListUsersRequest: {},
    users_pb2.CountUsersRequest: {},
    users_pb2.ExportUsersRequest: {},
    posts_pb2.CreatePostRequest: {"post": {"author_id": 7, "title": "Notes"}},
    posts_pb2.GetPostRequest: {"id": 7},
    posts_pb2.BatchGetPostsRequest: {"ids": [7]},
    posts_pb2.UpdatePostRequest: {"post": POST},
    posts_pb2.DeletePostRequest: {"id": 7},
    posts_pb2.BulkCreatePostsRequest: {"posts": [{"author_id": 7, "title": "Notes"}]},
    posts_pb2.BulkUpdatePostsRequest: {"options": {"update_mask": {"paths": ["title"]}}, "posts": [POST]},
    posts_pb2.BulkDeletePostsRequest: {"posts": [{"id": 7}]},
    posts_pb2.ListPostsRequest: {},
    posts_pb2.CountPostsRequest: {},
    posts_pb2.ExportPostsRequest: {},
    bulk_pb2.ListBulkLoadsRequest: {},
    bulk_pb2.GetBulkLoadRequest: {"load_id": "staff"},
    bulk_pb2.ListBulkLoadFailuresRequest: {"load_id": "staff"},
    bulk_pb2.ListBulkLoadRowsRequest: {"load_id": "staff"},
    bulk_pb2.AbortBulkLoadRequest: {"load_id": "staff"},
    changes_pb2.WatchChangesRequest: {},
    changes_pb2.ListChangesRequest: {},
}


async def is_refused(request: Message) -> bool:
    """Return whether a server refuses a request of an admin, whatever its database contains."""
    set_caller(ADMIN)
    try:
        result = CHECKS[type(request)](request)
        if isawaitable(result):
            await result
    except RosterError:
        return True
    return False
