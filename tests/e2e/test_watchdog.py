"""The watchdog of the suite finds service code that holds the event loop, and nothing else."""

import asyncio
import time

import pytest

from roster.v1.users_pb2 import GetUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from service.turns import Turn
from tests.errors import refusal
from tests.watchdog import LIMIT_SECONDS, watching


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


async def test_finds_a_callback_of_the_service_that_holds_the_event_loop() -> None:
    """Not only tasks: what a Turn does is a plain callback."""
    with watching() as recorder:
        Turn[int](lambda _: compute()).add(1)
        await asyncio.sleep(0.001)
    (hold,) = recorder.holds
    assert hold.startswith("Turn.end held the event loop")


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
