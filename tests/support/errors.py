"""The errors that callers get."""

from collections.abc import Awaitable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status


class Refusal:
    """The status of a call that failed, with its details unpacked."""

    def __init__(self, error: Any) -> None:
        self.code = error.code()
        self.message = error.details() or ""
        metadata = dict(error.trailing_metadata() or ())
        details = metadata.get("grpc-status-details-bin", b"")
        self.status = Status.FromString(details if isinstance(details, bytes) else details.encode())

    def detail(self, kind: type[Any]) -> Any:
        """Return the detail of this type, None if there is none."""
        for packed in self.status.details:
            message: Message = kind()
            if packed.Unpack(message):
                return message
        return None

    @property
    def reason(self) -> str:
        """The reason of the ErrorInfo."""
        return str(self.detail(ErrorInfo).reason)

    @property
    def facts(self) -> dict[str, str]:
        """The metadata of the ErrorInfo."""
        return dict(self.detail(ErrorInfo).metadata)

    @property
    def fields(self) -> list[str]:
        """The paths of the violated fields."""
        bad = self.detail(BadRequest)
        return [violation.field for violation in bad.field_violations] if bad else []

    @property
    def retry_seconds(self) -> float | None:
        """The delay before a retry, None if the error is not retryable."""
        retry = self.detail(RetryInfo)
        return retry.retry_delay.ToMilliseconds() / 1000 if retry else None


async def refusal(call: Awaitable[Any]) -> Refusal:
    """Return the error of a call; fails the test if the call succeeds."""
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return Refusal(caught.value)
