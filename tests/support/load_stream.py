"""Bulk streams that create users, message by message."""

from typing import Any, Self

from google.rpc.code_pb2 import ALREADY_EXISTS
from google.rpc.error_details_pb2 import ErrorInfo

from roster.v1.bulk_pb2 import BulkAck, BulkOpened, BulkOptions, BulkSummary, BulkWriteResponse, RowFailure
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from tests.support.errors import Refusal, refusal

LOAD_ID = "staff"


def named(*names: str, **fields: Any) -> list[User]:
    """Return rows with the e-mails name@example.org; a name with a space makes an invalid e-mail."""
    return [User(email=f"{name}@example.org", **fields) for name in names]


def email_taken(offset: int, existing_id: int) -> RowFailure:
    """Return the failure of a row whose e-mail belongs to another user."""
    return RowFailure(
        offset=offset,
        code=ALREADY_EXISTS,
        reason="EMAIL_TAKEN",
        field="email",
        message="email belongs to another user",
        existing_id=existing_id,
    )


def gap(ack: BulkAck) -> tuple[int, str, str]:
    """Return code, reason and expected offset of an ack's error."""
    info = ErrorInfo()
    ack.error.details[0].Unpack(info)
    return ack.error.code, info.reason, info.metadata["expected_offset"]


class LoadStream:
    """A bulk stream; `opened` is the server's first message, if `open` made the stream."""

    opened: BulkOpened

    def __init__(self, users: UserServiceAsyncStub) -> None:
        self.call = users.BulkCreateUsers()

    @classmethod
    async def open(cls, users: UserServiceAsyncStub, load_id: str = LOAD_ID, **options: Any) -> Self:
        """Open a stream; raises AioRpcError."""
        stream = cls(users)
        await stream.write(options=BulkOptions(**{"load_id": load_id, "return_ids": True, **options}))
        stream.opened = (await stream.answer()).opened
        return stream

    async def write(self, **fields: Any) -> None:
        """Send a message."""
        await self.call.write(BulkCreateUsersRequest(**fields))

    async def send(self, *names: str, **fields: Any) -> None:
        """Send rows."""
        await self.write(users=named(*names), **fields)

    async def answer(self) -> BulkWriteResponse:
        """Return the next event; raises AioRpcError."""
        event = await self.call.read()
        assert isinstance(event, BulkWriteResponse), "the stream has ended"
        return event

    async def acknowledged(self, *names: str, **fields: Any) -> BulkAck:
        """Send rows and return their ack."""
        await self.send(*names, **fields)
        event = await self.answer()
        assert event.HasField("ack")
        return event.ack

    async def finished(self, **fields: Any) -> BulkSummary:
        """Complete the load and return its summary."""
        await self.write(finish=True, **fields)
        return await self.summary()

    async def summary(self) -> BulkSummary:
        """Return the summary, the next event."""
        event = await self.answer()
        assert event.HasField("summary")
        return event.summary

    async def half_closed(self) -> BulkSummary:
        """End the stream without completing the load, and return its summary."""
        await self.call.done_writing()
        return await self.summary()

    async def refused(self, *names: str, **fields: Any) -> Refusal:
        """Send rows that end the stream, and return why."""
        await self.send(*names, **fields)
        return await refusal(self.answer())


async def load_once(rpc: Any, request: Any) -> BulkAck:
    """Send the only message of a load, and return its ack."""
    _, event, summary = [event async for event in rpc(iter([request]))]
    assert summary.HasField("summary")
    return event.ack  # type: ignore[no-any-return]


async def refused_to_open(users: UserServiceAsyncStub, **options: Any) -> Refusal:
    """Return why a stream could not be opened."""
    return await refusal(LoadStream.open(users, **options))
