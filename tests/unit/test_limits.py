"""The limits of calls, with a clock that the tests set."""

import asyncio

from roster.errors import RosterError
from roster.v1.users_pb2 import GetUserRequest
from service.auth.caller import Caller, set_caller
from service.interceptors import limits
from service.interceptors.chain import Rpc
from service.interceptors.limits import Limits
from service.settings import Settings

METHOD = "/roster.v1.UserService/GetUser"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rpc(path: str) -> Rpc:
    """Return a unary RPC."""
    return Rpc(path, GetUserRequest, is_upload=False, is_download=False)


async def answered(*_: object) -> str:
    return ""


async def reason_of_refusal(guard: Limits, caller: str, method: str = METHOD) -> str:
    """Make a call, and return the reason for which it was refused, or ""."""
    set_caller(Caller(caller))
    try:
        return str(await guard.intercept(rpc(method), answered)(None, None))  # type: ignore[arg-type]
    except RosterError as error:
        return error.reason


async def test_burst_has_the_calls_of_one_second() -> None:
    """After that the rate applies; each caller and each method has its own bucket."""
    clock = Clock()
    guard = Limits(Settings(caller_rate=4), clock)

    assert [await reason_of_refusal(guard, "ada") for _ in range(5)] == ["", "", "", "", "RATE_LIMITED"]
    assert await reason_of_refusal(guard, "alan") == ""
    assert await reason_of_refusal(guard, "ada", "/roster.v1.UserService/ListUsers") == ""
    clock.now += 0.25
    assert [await reason_of_refusal(guard, "ada") for _ in range(2)] == ["", "RATE_LIMITED"]
    clock.now += 1000
    assert [await reason_of_refusal(guard, "ada") for _ in range(5)] == ["", "", "", "", "RATE_LIMITED"]


async def test_idle_callers_are_evicted() -> None:
    """Memory is bounded by the callers of the last second; an empty bucket is kept."""
    clock = Clock()
    guard = Limits(Settings(caller_rate=1), clock)
    for number in range(limits.MAX_IDLE_USES - 1):
        await reason_of_refusal(guard, f"caller {number}")
    clock.now += 1
    await reason_of_refusal(guard, "ada")

    assert await reason_of_refusal(guard, "alan") == ""
    assert await reason_of_refusal(guard, "ada") == "RATE_LIMITED"
    assert len(guard._uses) == 2
    assert sum(use.in_flight for use in guard._uses.values()) == 0


async def test_caller_cannot_use_all_calls_with_several_methods() -> None:
    """A caller's share is half of the calls in flight that the others leave, so others get in."""
    guard, may_end = Limits(Settings(max_calls=8)), asyncio.Event()

    async def held(*_: object) -> None:
        await may_end.wait()

    async def hold(caller: str, method: str) -> None:
        set_caller(Caller(caller))
        await guard.intercept(rpc(method), held)(None, None)  # type: ignore[arg-type]

    calls = [asyncio.create_task(hold("greedy", f"/method/{number}")) for number in range(4)]
    await asyncio.sleep(0)
    assert await reason_of_refusal(guard, "greedy", "/method/4") == "QUOTA_EXCEEDED"
    assert await reason_of_refusal(guard, "ada") == ""

    calls += [asyncio.create_task(hold(caller, METHOD)) for caller in ("ada", "ada", "alan", "grace")]
    await asyncio.sleep(0)
    assert await reason_of_refusal(guard, "edsger") == "OVERLOADED"
    may_end.set()
    await asyncio.gather(*calls)
    assert await reason_of_refusal(guard, "greedy", "/method/4") == ""
