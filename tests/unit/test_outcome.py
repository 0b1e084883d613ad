"""The header that says what a CreateUser did, if the call is cancelled meanwhile."""

import asyncio
from typing import Any

import pytest

from service.db.bulk.batch import Result
from service.db.engine import CancelledAfterCommit
from service.users.servicer import _send_outcome


class CancelledContext:
    """The context of a call that is cancelled while it sends its header."""

    async def send_initial_metadata(self, metadata: Any) -> None:  # noqa: ARG002
        raise asyncio.CancelledError


@pytest.mark.parametrize("is_dry_run", [False, True])
async def test_only_a_write_is_reported_as_stored(is_dry_run: bool) -> None:
    """Otherwise the client would be asked to send it again."""
    context: Any = CancelledContext()
    with pytest.raises(asyncio.CancelledError) as caught:
        await _send_outcome(context, Result.CREATED, is_dry_run=is_dry_run)
    assert isinstance(caught.value, CancelledAfterCommit) != is_dry_run
