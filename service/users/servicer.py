"""UserService: users by id or e-mail, one at a time, in pages, and in bulk."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

from google.protobuf.empty_pb2 import Empty

from roster.errors import (
    OutcomeUnknown,
    ResourceExhausted,
    StatementTimeout,
    Unavailable,
    UnreadableHash,
    UserNotFound,
)
from roster.v1 import users_pb2 as pb
from roster.v1.bulk_pb2 import BulkWriteResponse
from roster.v1.resources_pb2 import User as UserMessage
from roster.v1.users_pb2_grpc import UserServiceServicer
from service.auth.caller import current_caller
from service.auth.policy import GET_USER, LIST_POSTS, UPDATE_USER
from service.auth.views import View, Views, limit_to_written
from service.bulk.operation import Kind, Operation
from service.bulk.stream import BulkStreams
from service.changes.export import Exports
from service.db.base import ReadSession, Session, Values
from service.db.bulk.batch import OnConflict, Result
from service.db.engine import CancelledAfterCommit, Database
from service.db.reads import Reader
from service.db.selection import Row
from service.idempotency import Writer
from service.interceptors.audit import note_effect
from service.interceptors.chain import Context, send_header
from service.metrics import HASHES_UNREADABLE
from service.users.convert import (
    BULK_WRITABLE,
    USER_ENCODER,
    keys_from_request,
    password_from_request,
    user_batch_from_messages,
    user_creation_from_request,
    user_keys_from_messages,
    user_to_fields,
    user_to_message,
    user_update_from_request,
    user_with_posts_to_fields,
)
from service.users.passwords import Passwords
from service.users.repository import (
    CREDENTIALS,
    USERS,
    WITH_POSTS,
    UserRepository,
    credentials_from_row,
)
from service.users.schemes import HashError
from service.validation import check_ids
from service.wire import at_most_from_request, missing_ids

log = logging.getLogger(__name__)

OUTCOME = "roster-outcome"  # the header of CreateUser's answer that says what was done
REQUIRED_ROLES = {"hashed_password": "loader"}
CREATE_USERS = Operation(
    pb.BulkCreateUsersRequest,
    USERS,
    user_batch_from_messages,
    BULK_WRITABLE,
    required_roles=REQUIRED_ROLES,
)
UPDATE_USERS = Operation(
    pb.BulkUpdateUsersRequest,
    USERS,
    user_batch_from_messages,
    BULK_WRITABLE,
    kind=Kind.UPDATE,
    required_roles=REQUIRED_ROLES,
)
DELETE_USERS = Operation(pb.BulkDeleteUsersRequest, USERS, user_keys_from_messages, (), kind=Kind.DELETE)
BASIC = View(UserRepository.basic(), user_to_fields, USER_ENCODER)
VIEWS = Views(
    UserMessage.View,
    {
        UserMessage.BASIC: BASIC,
        UserMessage.WITH_POSTS: View(WITH_POSTS, user_with_posts_to_fields, needs=LIST_POSTS),
    },
)


class UserServicer(UserServiceServicer):
    """UserService: users by id or e-mail, one at a time, in pages, and in bulk."""

    def __init__(
        self,
        database: Database,
        reader: Reader,
        passwords: Passwords,
        bulk: BulkStreams,
        exports: Exports,
    ) -> None:
        self.database = database
        self.reader = reader
        self.writer = Writer(database, UserRepository, UserMessage, user_to_message)
        self.passwords = passwords
        self.bulk = bulk
        self.exports = exports

    async def CreateUser(self, request: pb.CreateUserRequest, context: Context) -> UserMessage:
        creation = user_creation_from_request(request)
        _require_rights(creation.on_conflict)
        values = await self._hashed(creation.values, is_dry_run=request.validate_only)

        async def write(session: Session) -> tuple[Row, Result]:
            users = UserRepository(session)
            if creation.on_conflict is OnConflict.FAIL:
                return await users.create(values), Result.CREATED
            return await users.ensure(values, creation.changes(values))

        user, result = await self.writer.write(request, write)
        note_effect(result.name.lower(), user.id)
        if creation.on_conflict is not OnConflict.FAIL:
            await _send_outcome(context, result, is_dry_run=request.validate_only)
        return user

    async def GetUser(self, request: pb.GetUserRequest, context: Context) -> UserMessage:
        key, others = keys_from_request(request)
        view = VIEWS.get(request.view)
        if view is BASIC:
            return user_to_message(await self.reader.get(key, others))

        async def find(session: ReadSession) -> Row:
            users = UserRepository(session)
            if isinstance(key, str):
                return await users.get_by_email(key, view.selection, others)
            return await users.get(key, view.selection)

        return UserMessage(**view.to_fields(await self.reader.read(find)))

    async def BatchGetUsers(self, request: pb.BatchGetUsersRequest, context: Context) -> Any:
        ids = check_ids(request.ids)
        view = VIEWS.get(request.view)
        found = await self.reader.get_many(ids, view.selection)
        response = pb.BatchGetUsersResponse(**missing_ids(ids, found))
        return await view.response([user for user in found if user], response, response.users)

    async def ListUsers(self, request: pb.ListUsersRequest, context: Context) -> Any:
        query = await self.reader.list_query(request)
        view = VIEWS.get(request.view)
        page = await self.reader.page(query, view.selection)
        response = pb.ListUsersResponse(next_page_token=query.next_token(page))
        return await view.response(page.rows, response, response.users)

    async def CountUsers(self, request: pb.CountUsersRequest, context: Context) -> pb.CountUsersResponse:
        at_most = at_most_from_request(request)
        return pb.CountUsersResponse(**await self.reader.count(request.filter, at_most=at_most))

    async def UpdateUser(self, request: pb.UpdateUserRequest, context: Context) -> UserMessage:
        update = user_update_from_request(request)
        changes = await self._hashed(update.changes, is_dry_run=request.validate_only)
        update = replace(update, changes=changes)
        updated = await self.writer.update(request, update)
        return limit_to_written(updated, update.changes, reads=GET_USER)

    async def DeleteUser(self, request: pb.DeleteUserRequest, context: Context) -> Empty:
        return await self.writer.delete(request)

    async def VerifyPassword(
        self, request: pb.VerifyPasswordRequest, context: Context
    ) -> pb.VerifyPasswordResponse:
        (key, others), password = keys_from_request(request), password_from_request(request)
        id, stored = credentials_from_row(await self.reader.find_columns(key, CREDENTIALS, others))
        try:
            is_valid, stronger = await self.passwords.check(stored, password)
        except HashError as error:
            raise _unreadable_hash(id, error) from None
        if stronger:
            # If this fails, the next successful verification stores it.
            with suppress(Unavailable, ResourceExhausted, StatementTimeout, OutcomeUnknown):
                async with self.database.begin() as session:
                    await UserRepository(session).replace_hash(id, stored, stronger)
        return await self._verified(id) if is_valid else pb.VerifyPasswordResponse()

    def BulkCreateUsers(
        self, requests: AsyncIterator[pb.BulkCreateUsersRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        return self.bulk.run(requests, CREATE_USERS)

    def BulkUpdateUsers(
        self, requests: AsyncIterator[pb.BulkUpdateUsersRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        return self.bulk.run(requests, UPDATE_USERS)

    def BulkDeleteUsers(
        self, requests: AsyncIterator[pb.BulkDeleteUsersRequest], context: Context
    ) -> AsyncIterator[BulkWriteResponse]:
        return self.bulk.run(requests, DELETE_USERS)

    async def ExportUsers(self, request: pb.ExportUsersRequest, context: Context) -> AsyncIterator[Any]:
        responses = self.exports.run(self.reader, USER_ENCODER, pb.ExportUsersResponse, request)
        async with aclosing(responses):
            async for response in responses:
                yield response

    async def _hashed(self, values: Values, *, is_dry_run: bool) -> Values:
        """Return the values to store; a dry run stores none, and gets an empty hash at once."""
        if "hashed_password" in values:
            current_caller().require("loader", "hashed_password")
        stored = dict(values)
        if "password" in stored:
            password = stored.pop("password")
            stored["hashed_password"] = "" if is_dry_run else await self.passwords.hash(password)
        return stored

    async def _verified(self, id: int) -> pb.VerifyPasswordResponse:
        try:
            user = await self.reader.get(id)
        except UserNotFound:  # deleted since its hash was read
            return pb.VerifyPasswordResponse()
        return pb.VerifyPasswordResponse(valid=True, user=user_to_fields(user))


def _require_rights(on_conflict: OnConflict) -> None:
    """Check that the caller may see the user who has the e-mail, and may change it if that is asked for."""
    part = f"on_conflict {on_conflict.name}"
    if on_conflict is not OnConflict.FAIL:
        current_caller().require_rpc(GET_USER, part)
    if on_conflict is OnConflict.UPDATE:
        current_caller().require_rpc(UPDATE_USER, part)


async def _send_outcome(context: Context, result: Result, *, is_dry_run: bool) -> None:
    """Send what CreateUser did as a header.

    Only if it was asked for: a header is sent apart from the response, and gRPC's clients repeat no call of
    which they have received the header.
    """
    try:
        await send_header(context, ((OUTCOME, result.name.lower()),))
    except asyncio.CancelledError:
        if is_dry_run:
            raise
        # Otherwise a server that stops would ask the client to send the write again.
        raise CancelledAfterCommit from None


def _unreadable_hash(id: int, error: HashError) -> UnreadableHash:
    """Count and log a stored hash that can't be checked, and return what the caller gets.

    Only a write past the service can store one, or a release that accepted it. The caller learns that the
    user exists, and that a new password solves it: as a wrong password this would never be found.
    """
    HASHES_UNREADABLE.inc()
    log.error("the password of user %d can't be verified: hashed_password %s", id, error)
    return UnreadableHash("the stored password hash of this user can't be checked; set a new password")
