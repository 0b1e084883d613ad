"""The watchdog of the tests finds service code that blocks the event loop, and no other code."""

import asyncio
import io
import logging
import time

import pytest

from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.logs import BufferedStreamHandler
from service.server import Server
from tests.support.errors import refusal
from tests.support.watchdog import LIMIT_SECONDS, watching


def compute() -> None:
    """Use five times the CPU time of a callback's limit, which is higher while the machine is disturbed."""
    end = time.thread_time() + 5 * LIMIT_SECONDS
    while time.thread_time() < end:
        pass


async def test_finds_a_handler_that_blocks_the_event_loop(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An RPC's handler is recognised by the coroutine that grpc.aio runs it in."""
    monkeypatch.setattr(server.users, "get", lambda *_: compute())
    with watching() as recorder:
        await refusal(users.GetUser(GetUserRequest(id=1)))
    (hold,) = recorder.holds
    assert hold.startswith("an RPC handler held the event loop")


async def test_finds_a_callback_that_blocks_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The log, for example, is flushed by a plain callback."""
    handler = BufferedStreamHandler()
    handler.setStream(io.StringIO())
    monkeypatch.setattr(handler, "format", lambda _: compute())
    with watching() as recorder:
        handler.handle(logging.makeLogRecord({"levelno": logging.INFO}))
        await asyncio.sleep(0.001)
    (hold,) = recorder.holds
    assert hold.startswith("BufferedStreamHandler.flush held the event loop")


async def test_ignores_work_of_the_test_and_waiting(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both use the loop's thread, or block it without using the CPU."""
    monkeypatch.setattr(server.users, "get", lambda *_: time.sleep(5 * LIMIT_SECONDS))
    with watching() as recorder:
        compute()
        await refusal(users.GetUser(GetUserRequest(id=1)))
    assert not recorder.holds
    assert recorder.longest_seconds > 0
