"""The watchdog of the suite finds service code that holds the event loop, and nothing else."""

import asyncio
import io
import logging
import time

import pytest

from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.logs import BufferedStreamHandler
from service.server import Server
from tests.support.errors import refusal
from tests.support.watchdog import LIMIT_SECONDS, watching


def compute() -> None:
    """Use five times as much CPU as a callback may: one is allowed more while the machine is disturbed."""
    end = time.thread_time() + 5 * LIMIT_SECONDS
    while time.thread_time() < end:
        pass


async def test_finds_a_handler_that_holds_the_event_loop(
    server: Server, users: UserServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler of an RPC is known by the coroutine that grpc.aio runs it in."""
    monkeypatch.setattr(server.users, "get", lambda _: compute())
    with watching() as recorder:
        await refusal(users.GetUser(GetUserRequest(id=1)))
    (hold,) = recorder.holds
    assert hold.startswith("an RPC handler held the event loop")


async def test_finds_a_callback_of_the_service_that_holds_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not only tasks: the log is flushed by a plain callback."""
    handler = BufferedStreamHandler()
    handler.setStream(io.StringIO())
    monkeypatch.setattr(handler, "format", lambda _: compute())
    with watching() as recorder:
        handler.handle(logging.makeLogRecord({"levelno": logging.INFO}))
        await asyncio.sleep(0.001)
    (hold,) = recorder.holds
    assert hold.startswith("BufferedStreamHandler.flush held the event loop")


async def test_the_test_s_own_work_and_waiting_are_not_counted(
    server: Server, users: UserServiceStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both share the loop's thread with the service, or hold it without using the CPU."""
    monkeypatch.setattr(server.users, "get", lambda _: time.sleep(5 * LIMIT_SECONDS))
    with watching() as recorder:
        compute()
        await refusal(users.GetUser(GetUserRequest(id=1)))
    assert not recorder.holds
    assert recorder.longest_seconds > 0
