"""Repeatable writes: one with a `request_id` happens once, and is answered the same each time."""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any, TypeVar
from uuid import UUID

from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncSession

from service.auth.caller import current_caller
from service.db.requests import RequestRepository
from service.errors import InvalidField

AnswerT = TypeVar("AnswerT", bound=Message)


async def once(
    session: AsyncSession, request: Any, answer: type[AnswerT], write: Callable[[], Awaitable[AnswerT]]
) -> AnswerT:
    """Return what `write` answers, or what it answered when the same request came first.

    Raises InvalidField for an id that is no UUID, RequestIdReused where it came with another body.
    """
    request_id = request_id_from_text(request.request_id)
    if request_id is None:
        return await write()
    requests = RequestRepository(session, current_caller().identity, request.DESCRIPTOR.full_name)
    first = await requests.claim(request_id, _fingerprint(request))
    if first is not None:
        return answer.FromString(first)
    message = await write()
    await requests.keep(request_id, message.SerializeToString())
    return message


def _fingerprint(request: Any) -> bytes:
    body = type(request)()
    body.CopyFrom(request)
    body.ClearField("request_id")  # one UUID has several spellings
    if "user" in body.DESCRIPTOR.fields_by_name:
        body.user.ClearField("password")
    return sha256(body.SerializeToString(deterministic=True)).digest()


def request_id_from_text(text: str) -> UUID | None:
    """Return a `request_id`, None for an empty one; raises InvalidField."""
    if not text:
        return None
    try:
        return UUID(text)
    except ValueError:
        message = "request_id must be a UUID such as 7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10"
        raise InvalidField(message, field="request_id") from None
