"""Writes of single rows. One with a `request_id` happens once, and every repetition gets its first answer.

The answer is stored in the transaction of the write, so that either both exist or neither does. Two calls
with the same `request_id` meet at the primary key of `requests`: the second waits there until the first
commits, and then returns its answer, or until the first rolls back, and then does the write itself.

If the row in an answer is deleted, the answer is erased (`service/db/answers.py`): a repetition then reports
that the row does not exist.

A call with `validate_only` is a dry run: its transaction is rolled back, so that all checks are those of the
write. Its `request_id` is neither stored nor looked up.
"""

import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, Generic, TypeAlias, TypeVar, cast
from uuid import UUID

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from roster.errors import InvalidField, RequestIdReused
from service.auth.caller import current_caller
from service.db.answers import Request
from service.db.base import Session, Values
from service.db.bulk.batch import Result
from service.db.dialect import insert
from service.db.engine import Database
from service.db.repository import Repository
from service.db.selection import Row
from service.wire import DeleteRequest, Update, WriteRequest, deletion_from_request

KEPT_FOR = timedelta(hours=24)
# UUID() also reads what int() does: signs, white space, underscores and digits of other scripts.
UUID_TEXT = re.compile(r"(?:urn:uuid:)?\{?[0-9A-Fa-f-]+\}?")
SET_BY_THE_DATABASE = ("id", "created_at", "updated_at")  # in a new row

AnyRepository: TypeAlias = type[Repository[Any, Session]]
AnswerT = TypeVar("AnswerT", bound=Message)
RowT = TypeVar("RowT", bound=Row | None)


async def idempotent(
    database: Database,
    repository: AnyRepository,
    request: WriteRequest,
    answer: type[AnswerT],
    write: Callable[[Session], Awaitable[tuple[RowT, Result]]],
    to_message: Callable[[RowT], AnswerT],
) -> tuple[AnswerT, Result]:
    """Run `write` in a transaction and return the answer and the result, or those stored for the request.

    `write` returns the row that was written, or None, and what was done with it. Raises InvalidField if the
    `request_id` is not a UUID, RequestIdReused if it came with another body, and the entity's NotFound if the
    answer has been erased.
    """
    request_id = request_id_from_text(request.request_id)
    async with database.begin(is_dry_run=request.validate_only) as session:
        if request_id is None or request.validate_only:
            row, result = await write(session)
            return to_message(row), result
        body, identity = cast("Message", request), current_caller().identity
        requests = RequestRepository(session, identity, body.DESCRIPTOR.full_name, repository)
        stored = await requests.claim(request_id, fingerprint(body))
        if stored is not None:
            first, result = stored
            return answer.FromString(first), result
        row, result = await write(session)
        message = to_message(row)
        row_id = None if row is None else row.id
        await requests.store(request_id, message.SerializeToString(), result, row_id)
        return message, result


class Writer(Generic[AnswerT]):
    """Writes single rows of one entity, each in a transaction of its own, and returns them as messages.

    All methods raise the errors of the repository and of `idempotent`.
    """

    def __init__(
        self,
        database: Database,
        repository: AnyRepository,
        message: type[AnswerT],
        to_message: Callable[[Row], AnswerT],
    ) -> None:
        self._database = database
        self._repository = repository
        self._message = message
        self._to_message = to_message

    async def create(self, request: WriteRequest, values: Values) -> AnswerT:
        """Insert a row."""

        async def create(session: Session) -> tuple[Row, Result]:
            return await self._repository(session).create(values), Result.CREATED

        message, _ = await self.write(request, create)
        return message

    async def update(self, request: WriteRequest, update: Update) -> AnswerT:
        """Update a row."""

        async def write(session: Session) -> tuple[Row, Result]:
            rows = self._repository(session)
            return await rows.update(update.id, update.changes, update.version), Result.UPDATED

        message, _ = await self.write(request, write)
        return message

    async def delete(self, request: DeleteRequest) -> Empty:
        """Delete a row; raises InvalidField."""
        id, version = deletion_from_request(request)

        async def delete(session: Session) -> tuple[None, Result]:
            rows = self._repository(session)
            await (rows.lock_to_delete if request.validate_only else rows.delete)(id, version)
            return None, Result.DELETED

        empty, _ = await idempotent(
            self._database, self._repository, request, Empty, delete, lambda _: Empty()
        )
        return empty

    async def write(
        self, request: WriteRequest, write: Callable[[Session], Awaitable[tuple[Row, Result]]]
    ) -> tuple[AnswerT, Result]:
        """Run a function that writes a row; return the answer, and what was done with the row.

        The new row of a dry run has no id and no times.
        """
        message, result = await idempotent(
            self._database, self._repository, request, self._message, write, self._to_message
        )
        if request.validate_only and result is Result.CREATED:
            for name in SET_BY_THE_DATABASE:
                message.ClearField(name)
        return message, result


def request_id_from_text(text: str) -> UUID | None:
    """Return a `request_id`, None for an empty one; raises InvalidField."""
    if not text:
        return None
    if UUID_TEXT.fullmatch(text):
        with suppress(ValueError):
            return UUID(text)
    message = "request_id must be a UUID such as 7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10"
    raise InvalidField(message, field="request_id")


def fingerprint(request: Message) -> bytes:
    """Return a digest of a request without its `request_id` and without sensitive fields.

    A `request_id` can be spelled in several ways. A fast digest of a password would be easy to reverse.
    """
    body = type(request)()
    body.CopyFrom(request)
    body.ClearField("request_id")
    _clear_sensitive_fields(body)
    return sha256(body.SerializeToString(deterministic=True)).digest()


def _clear_sensitive_fields(message: Message) -> None:
    """Clear the fields that the contract marks with the option `debug_redact`, except hashes.

    A digest of a password hash reveals no more than the hash, which is stored too.
    """
    for field, value in message.ListFields():
        if field.GetOptions().debug_redact and not field.name.startswith("hashed_"):
            message.ClearField(field.name)
        elif field.message_type is not None and not field.is_repeated:
            _clear_sensitive_fields(value)


class RequestRepository:
    """The stored requests of one caller to one method, which writes rows of one entity."""

    def __init__(self, session: AsyncSession, caller: str, method: str, repository: AnyRepository) -> None:
        self.session = session
        self.caller = caller
        self.method = method
        self.repository = repository

    async def claim(self, request_id: UUID, fingerprint: bytes) -> tuple[bytes, Result] | None:
        """Return the stored answer to a request, and its result.

        None means that the caller is to do the write and store its answer. Must be the first statement of the
        transaction. Raises RequestIdReused if the fingerprint differs, and the entity's NotFound if the
        answer has been erased.
        """
        key = {"caller": self.caller, "method": self.method, "request_id": request_id}
        is_claimed = await self.session.scalar(
            insert(self.session, Request)
            .values(**key, fingerprint=fingerprint)
            .on_conflict_do_nothing()
            .returning(Request.request_id)
        )
        if is_claimed:
            return None
        # The lock is written to the log of PostgreSQL, so that this commit waits for a standby. The wait of
        # the first commit may have been cut short, and an answer must not be given before it is safe.
        columns = (Request.fingerprint, Request.answer, Request.outcome)
        stored = select(*columns).filter_by(**key).with_for_update(read=True)
        first = (await self.session.execute(stored)).one_or_none()
        if first is None:  # deleted between the two statements
            return await self.claim(request_id, fingerprint)
        if first.answer is None:
            raise self.repository.missing()
        if first.fingerprint != fingerprint:
            raise RequestIdReused(
                "this request_id was used with another body; use a new one for a new request",
                field="request_id",
            )
        # Earlier releases stored no outcome; their creates have created the row.
        return bytes(first.answer), Result(first.outcome or Result.CREATED)

    async def store(self, request_id: UUID, answer: bytes, result: Result, row_id: int | None = None) -> None:
        """Store the answer to a claimed request, its result, and the id of the row in it."""
        entity = None if row_id is None else self.repository.model.__tablename__
        await self.session.execute(
            update(Request)
            .filter_by(caller=self.caller, method=self.method, request_id=request_id)
            .values(answer=answer, entity=entity, entity_id=row_id, outcome=result)
        )


async def delete_expired_requests(session: AsyncSession, at: datetime) -> None:
    """Delete the answers that are older than 24 hours at the time `at`.

    Those that an erasure has locked are left for the next time: waiting for them could deadlock.
    """
    key = tuple_(Request.caller, Request.method, Request.request_id)
    expired = select(Request.caller, Request.method, Request.request_id).where(
        Request.created_at < at - KEPT_FOR
    )
    await session.execute(delete(Request).where(key.in_(expired.with_for_update(skip_locked=True))))
