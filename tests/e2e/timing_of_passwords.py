"""How long VerifyPassword takes must not tell who exists: `make test-timing`, apart from the other tests."""

import random
import time
from bisect import bisect_left, bisect_right

import pytest

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest, VerifyPasswordRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub

TRIALS = 2000
KNOWN, UNKNOWN = "ada@example.org", "eve@example.org"


def separation(some: list[float], others: list[float]) -> float:
    """How often a guess by time alone is right (the area under the ROC curve); 0.5 is a coin's."""
    ordered = sorted(others)
    below = sum(bisect_left(ordered, one) + bisect_right(ordered, one) for one in some) / 2
    area = below / (len(some) * len(others))
    return max(area, 1 - area)


@pytest.mark.timeout(900)
async def test_the_time_does_not_tell_who_exists(users: UserServiceAsyncStub) -> None:
    """A wrong password of a user, and any password of nobody, in random order."""
    await users.CreateUser(CreateUserRequest(user=User(email=KNOWN, password="right")))
    order = [KNOWN, UNKNOWN] * (TRIALS // 2)
    random.shuffle(order)
    seconds: dict[str, list[float]] = {KNOWN: [], UNKNOWN: []}
    for email in order:
        begun = time.perf_counter()
        answer = await users.VerifyPassword(VerifyPasswordRequest(email=email, password="wrong"))
        seconds[email].append(time.perf_counter() - begun)
        assert not answer.valid

    area = separation(seconds[KNOWN], seconds[UNKNOWN])
    print(f"AUC {area:.3f} over {TRIALS} trials")  # noqa: T201 (what one runs it for)
    assert area <= 0.55
