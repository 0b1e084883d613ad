"""UserService: users by id or e-mail, one at a time, in pages, and in bulk."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from google.protobuf.empty_pb2 import Empty
from sqlalchemy import ColumnElement
from sqlalchemy.ext.asyncio import AsyncSession

from roster.v1 import users_pb2 as pb
from roster.v1.bulk_pb2 import BulkWriteResponse
from roster.v1.resources_pb2 import User as UserMessage
from roster.v1.users_pb2_grpc import UserServiceServicer
from service.auth.caller import current_caller
from service.auth.policy import GET_USER, LIST_POSTS
from service.auth.views import View, as_written
from service.bulk.operation import Operation
from service.bulk.streams import BulkStreams
from service.db.engine import Database
from service.db.listing import Listing, batches
from service.errors import OutcomeUnknown, ResourceExhausted, StatementTimeout, Unavailable, UserNotFound
from service.idempotency import idempotent
from service.interceptors.around import Context
from service.timeslice import add_in_slices
from service.users.convert import (
    BULK_WRITABLE,
    credentials_from_request,
    key_from_request,
    user_batch_from_messages,
    user_from_message,
    user_to_fields,
    user_to_message,
    user_update_from_request,
    user_with_posts_to_fields,
)
from service.users.model import User
from service.users.passwords import Passwords
from service.users.reader import UserReader
from service.users.repository import FILTERABLE, SORTABLE, UserRepository, email_taken
from service.users.rules import normalise_email
from service.validation import check_ids
from service.wire import deleted_to_message, deletion_from_request, export_from_request

CREATE_USERS = Operation(
    method="roster.v1.UserService.BulkCreateUsers",
    request=pb.BulkCreateUsersRequest,
    rows="users",
    fields=BULK_WRITABLE,
    writable=BULK_WRITABLE[1:],  # the e-mail is the key
    read=user_batch_from_messages,
    model=User,
    write=lambda session, batch, options: UserRepository(session).create_many(batch, options),
    taken=email_taken,
)
UPDATE_USERS = Operation(
    method="roster.v1.UserService.BulkUpdateUsers",
    request=pb.BulkUpdateUsersRequest,
    rows="users",
    fields=("id", "version"),
    writable=BULK_WRITABLE,
    read=user_batch_from_messages,
    model=User,
    write=lambda session, batch, options: UserRepository(session).update_many(batch, options),
    is_update=True,
)
WITH_POSTS = View(UserMessage.View, UserMessage.WITH_POSTS, needs=LIST_POSTS)
LISTING = Listing("users", FILTERABLE, SORTABLE, {"email": normalise_email})


class UserServicer(UserServiceServicer):
    """UserService: users by id or e-mail, one at a time, in pages, and in bulk."""

    def __init__(
        self, database: Database, reader: UserReader, passwords: Passwords, bulk: BulkStreams
    ) -> None:
        self.database = database
        self.reader = reader
        self.passwords = passwords
        self.bulk = bulk

    async def CreateUser(self, request: pb.CreateUserRequest, context: Context) -> UserMessage:
        values = await self._hashed(user_from_message(request.user))
        return await idempotent(
            self.database,
            request,
            UserMessage,
            lambda session: UserRepository(session).create(values),
            user_to_message,
        )

    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> UserMessage:
        key = key_from_request(request)
        if not WITH_POSTS.is_asked(request.view):
            return UserMessage(**user_to_fields(await self.reader.get(key)))
        async with self.database.read() as session:
            user = await UserRepository(session, with_posts=True).get_by(_is_key(key))
        return user_to_message(user, with_posts=True)

    async def BatchGetUsers(
        self, request: pb.BatchGetUsersRequest, context: Context
    ) -> pb.BatchGetUsersResponse:
        ids = check_ids(request.ids)
        if not WITH_POSTS.is_asked(request.view):
            rows = await self.reader.get_many(ids)
            return pb.BatchGetUsersResponse(
                users=[user_to_fields(rows[id]) for id in ids if id in rows],
                missing_ids=[id for id in ids if id not in rows],
            )
        async with self.database.read() as session:
            found = await UserRepository(session, with_posts=True).get_many(ids)
        response = pb.BatchGetUsersResponse(
            missing_ids=[id for id, user in zip(ids, found, strict=False) if not user],
            remaining_ids=ids[len(found) :],
        )
        await add_in_slices(response.users, user_with_posts_to_fields, [user for user in found if user])
        return response

    async def ListUsers(self, request: pb.ListUsersRequest, context: Context) -> pb.ListUsersResponse:
        query = await LISTING.query(request)
        with_posts = WITH_POSTS.is_asked(request.view)
        async with self.database.read() as session:
            users, token = await query.page(_repository(session, with_posts=with_posts))
        response = pb.ListUsersResponse(next_page_token=token)
        await add_in_slices(response.users, _fields_of(with_posts=with_posts), users)
        return response

    async def UpdateUser(self, request: pb.UpdateUserRequest, context: Context) -> UserMessage:
        update = user_update_from_request(request)
        changes = await self._hashed(update.changes)
        updated = await idempotent(
            self.database,
            request,
            UserMessage,
            lambda session: UserRepository(session).update(update.id, changes, update.version),
            user_to_message,
        )
        return as_written(updated, changes, reads=GET_USER)

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Context) -> Empty:
        id, version = deletion_from_request(request)
        return await idempotent(
            self.database,
            request,
            Empty,
            lambda session: UserRepository(session).delete(id, version),
            deleted_to_message,
        )

    async def VerifyPassword(
        self, request: pb.VerifyPasswordRequest, context: Context
    ) -> pb.VerifyPasswordResponse:
        key, password = credentials_from_request(request)
        id, stored = await self.reader.password_hash(key)
        is_valid, stronger = await self.passwords.check(stored, password)
        if stronger:
            with suppress(
                Unavailable, ResourceExhausted, StatementTimeout, OutcomeUnknown
            ):  # the next success will do
                async with self.database.begin() as session:
                    await UserRepository(session).replace_hash(id, stored, stronger)
        return await self._verified(id) if is_valid else pb.VerifyPasswordResponse()

    async def BulkCreateUsers(
        self, requests: AsyncIterator[pb.BulkCreateUsersRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        async with aclosing(self.bulk.run(requests, CREATE_USERS)) as events:
            async for event in events:
                yield event

    async def BulkUpdateUsers(
        self, requests: AsyncIterator[pb.BulkUpdateUsersRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        async with aclosing(self.bulk.run(requests, UPDATE_USERS)) as events:
            async for event in events:
                yield event

    async def ExportUsers(
        self, request: pb.ExportUsersRequest, context: Context
    ) -> AsyncIterator[pb.ExportUsersResponse]:
        conditions = await LISTING.conditions(request.filter)
        after_id, limit = export_from_request(request)
        rows = batches(self.database, UserRepository, conditions, after_id, limit)
        async with aclosing(rows):
            async for users in rows:
                yield pb.ExportUsersResponse(users=map(user_to_fields, users), last_id=users[-1].id)

    async def _hashed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if "hashed_password" in values:
            current_caller().require("loader", "hashed_password")
        stored = dict(values)
        if "password" in stored:
            stored["hashed_password"] = await self.passwords.hash(stored.pop("password"))
        return stored

    async def _verified(self, id: int) -> pb.VerifyPasswordResponse:
        try:
            user = await self.reader.get(id)
        except UserNotFound:  # deleted in between
            return pb.VerifyPasswordResponse()
        return pb.VerifyPasswordResponse(valid=True, user=user_to_fields(user))


def _is_key(key: int | str) -> ColumnElement[bool]:
    return User.email == key if isinstance(key, str) else User.id == key


def _repository(session: AsyncSession, *, with_posts: bool) -> UserRepository:
    """Return what reads entities where the view needs them, otherwise columns."""
    repository = UserRepository(session, with_posts=with_posts)
    return repository if with_posts else repository.as_columns()


def _fields_of(*, with_posts: bool) -> Callable[[Any], dict[str, Any]]:
    return user_with_posts_to_fields if with_posts else user_to_fields
