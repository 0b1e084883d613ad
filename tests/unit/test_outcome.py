"""What follows a write before its answer, its header and its consistency token, if the call is cancelled."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest
from service.db.bulk.batch import Result
from service.db.engine import CancelledAfterCommit
from service.interceptors.chain import Rpc
from service.interceptors.consistency import Consistency
from service.users.servicer import _send_outcome


class Cancelled:
    """The context of a call, and the position of the primary, with which the call is cancelled."""

    async def send_initial_metadata(self, metadata: Any) -> None:  # noqa: ARG002
        raise asyncio.CancelledError

    def time_remaining(self) -> None:
        return None

    async def current(self, seconds: float) -> None:  # noqa: ARG002
        raise asyncio.CancelledError


async def send_header(is_dry_run: bool) -> None:
    context: Any = Cancelled()
    await _send_outcome(context, Result.CREATED, is_dry_run=is_dry_run)


async def add_token(is_dry_run: bool) -> None:
    async def create(*_: object) -> User:
        return User()

    cancelled: Any = Cancelled()
    rpc = Rpc("/roster.v1.UserService/CreateUser", CreateUserRequest, is_upload=False, is_download=False)
    call = Consistency(cancelled).intercept(rpc, create)
    await call(CreateUserRequest(validate_only=is_dry_run), cancelled)


@pytest.mark.parametrize("finish", [send_header, add_token])
@pytest.mark.parametrize("is_dry_run", [False, True])
async def test_only_a_write_is_reported_as_stored(
    finish: Callable[[bool], Awaitable[None]], is_dry_run: bool
) -> None:
    """Otherwise the client would be asked to send it again."""
    with pytest.raises(asyncio.CancelledError) as caught:
        await finish(is_dry_run)
    assert isinstance(caught.value, CancelledAfterCommit) != is_dry_run
