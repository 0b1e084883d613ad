"""Errors that are not answered."""

import asyncio
import logging
from typing import Any

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from roster.v1.changes_pb2 import WatchChangesRequest
from service.interceptors.chain import Rpc
from service.interceptors.errors import answer_errors


async def test_write_to_a_client_that_is_gone_ends_the_call_quietly(caplog: pytest.LogCaptureFixture) -> None:
    """grpc.aio raises this if the client leaves during a write, before it cancels the call."""

    async def write(*_: Any) -> None:
        raise cygrpc.ExecuteBatchError("Failed execute_batch")

    rpc = Rpc("/roster.v1.ChangeService/WatchChanges", WatchChangesRequest, is_upload=False, is_download=True)
    unused: Any = None
    with caplog.at_level(logging.DEBUG), pytest.raises(asyncio.CancelledError):
        await answer_errors(rpc, write)(unused, unused)
    assert caplog.messages == []
