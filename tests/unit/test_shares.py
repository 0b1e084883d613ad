"""Fair shares: which request is served next, how much a caller may hold, and that no slot is lost."""

import asyncio
from collections import Counter, deque
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from service.auth.caller import ANONYMOUS_IDENTITY, SYSTEM
from service.shares import FairQueue, FairSemaphore

CALLERS = ("ada", "alan", "grace")


class Line:
    """Acquisitions of one semaphore, in the order in which they succeed."""

    def __init__(self, size: int, part: int = 2) -> None:
        self.shares = FairSemaphore(size, part)
        self.served: list[str] = []

    def acquire(self, caller: str, weight: int = 1) -> asyncio.Task[None]:
        return asyncio.create_task(self._acquire(caller, weight))

    async def _acquire(self, caller: str, weight: int) -> None:
        await self.shares.acquire(caller, weight)
        self.served.append(caller)


async def until_idle() -> None:
    """Run all tasks as far as possible."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("part", "held"), [(2, [10, 5, 3, 1, 1]), (4, [5, 4, 3, 2, 2, 1, 1, 1, 1])], ids=["half", "quarter"]
)
async def test_caller_holds_a_part_of_the_free_slots(part: int, held: list[int]) -> None:
    """Each new caller gets that part of the rest, rounded up, until nothing is left."""
    line = Line(20, part)
    calls = [line.acquire(caller) for caller in "abcdefghij" for _ in range(20)]
    await until_idle()

    assert list(Counter(line.served).values()) == held
    assert line.shares.free == 0
    for call in calls:
        call.cancel()


@pytest.mark.parametrize("caller", [SYSTEM, ANONYMOUS_IDENTITY])
async def test_only_caller_may_hold_all_slots_without_a_policy(caller: str) -> None:
    """So may the server itself."""
    shares = FairSemaphore(3)
    assert [shares.try_acquire(caller) for _ in range(4)] == [True, True, True, False]
    assert not shares.is_capped(caller)


async def test_waiting_callers_take_turns() -> None:
    """The requests of one caller keep their order."""
    line = Line(1)
    await line.acquire("grace")
    waiting = [line.acquire(caller) for caller in ("ada", "ada", "ada", "alan", "alan")]
    for holder in ("grace", "ada", "alan", "ada", "alan"):
        await until_idle()
        line.shares.release(holder)
    await asyncio.gather(*waiting)

    assert line.served == ["grace", "ada", "alan", "ada", "alan", "ada"]


async def test_new_caller_passes_callers_that_used_their_share() -> None:
    """Slots that these may not have are for others."""
    line = Line(4)
    greedy = [line.acquire("ada") for _ in range(10)]
    await until_idle()
    await asyncio.wait_for(line.acquire("alan"), 1)

    assert line.served == ["ada", "ada", "alan"]
    assert line.shares.is_capped("ada")
    assert line.shares.waiting("ada") == 8
    for task in greedy:
        task.cancel()


async def test_light_request_does_not_pass_a_heavy_one() -> None:
    """Otherwise a steady flow of light requests would starve it."""
    line = Line(4)
    for caller in ("ada", "alan"):
        await line.acquire(caller)
    heavy = line.acquire("grace", 3)
    await until_idle()
    light = line.acquire("edsger")
    await until_idle()
    assert line.served == ["ada", "alan"]

    line.shares.release("ada")
    await asyncio.gather(heavy)
    line.shares.release("alan")
    await asyncio.gather(light)
    assert line.served == ["ada", "alan", "grace", "edsger"]


async def test_weight_above_all_slots_takes_all_of_them() -> None:
    """It waits until all slots are free, and returns as many as it took."""
    shares = FairSemaphore(4)
    await shares.acquire("ada", 100)
    assert shares.free == 0
    shares.release("ada", 100)
    assert shares.free == 4


async def test_wait_ends_at_its_timeout() -> None:
    """Nothing of the request remains."""
    shares = FairSemaphore(1)
    await shares.acquire("ada")
    with pytest.raises(TimeoutError):
        await shares.acquire("alan", timeout=0.01)
    assert shares.waiting("alan") == 0
    shares.release("ada")
    assert shares.try_acquire("grace")


@pytest.mark.parametrize("is_served_first", [True, False])
async def test_cancelled_wait_loses_no_slot(is_served_first: bool) -> None:
    """Whether it is cancelled just before or just after it is served, in the same iteration of the loop."""
    line = Line(1)
    await line.acquire("ada")
    leaving, staying = line.acquire("alan"), line.acquire("grace")
    await until_idle()
    steps: list[Callable[[], object]] = [lambda: line.shares.release("ada"), leaving.cancel]
    for step in steps if is_served_first else reversed(steps):
        step()
    await asyncio.wait([leaving, staying], timeout=1)

    assert line.served == ["ada", "grace"]
    line.shares.release("grace")
    assert line.shares.free == 1


class Model:
    """A simple model of the rules: a list of requests, all of which are looked at."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.held: Counter[str] = Counter()
        self.turns: list[str] = []
        self.waiting: dict[str, list[tuple[int, int]]] = {}  # number and weight
        self.served: list[int] = []

    def acquire(self, number: int, caller: str, weight: int) -> None:
        if caller not in self.turns:
            self.turns.append(caller)
        self.waiting.setdefault(caller, []).append((number, weight))
        self.serve()

    def leave(self, number: int, caller: str) -> None:
        self.waiting[caller] = [waiter for waiter in self.waiting[caller] if waiter[0] != number]
        if not self.waiting[caller]:
            self.turns.remove(caller)
        self.serve()

    def release(self, caller: str, weight: int) -> None:
        self.free += weight
        self.held[caller] -= weight
        self.serve()

    def serve(self) -> None:
        for caller in self.turns:
            number, weight = self.waiting[caller][0]
            held = self.held[caller]
            if held and held + weight > -((self.free + held) // -2):
                continue
            if weight <= self.free:
                self.take(number, caller, weight)
                self.serve()
            return

    def take(self, number: int, caller: str, weight: int) -> None:
        self.free -= weight
        self.held[caller] += weight
        self.served.append(number)
        self.waiting[caller].pop(0)
        self.turns.remove(caller)
        if self.waiting[caller]:
            self.turns.append(caller)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "release", "cancel"]),
        st.sampled_from(CALLERS),
        st.integers(1, 3),
        st.integers(0, 100),
    ),
    max_size=40,
)


@given(st.integers(3, 8), STEPS)
@settings(deadline=None, max_examples=200)
def test_agrees_with_a_model(size: int, steps: list[tuple[str, str, int, int]]) -> None:
    """For any order of acquisitions, releases and cancellations; at the end every slot is free."""
    asyncio.run(replay(size, steps))


async def replay(size: int, steps: list[tuple[str, str, int, int]]) -> None:
    shares, model = FairSemaphore(size), Model(size)
    served: list[int] = []
    calls: dict[int, tuple[str, int, asyncio.Task[None]]] = {}

    async def acquire(number: int, caller: str, weight: int) -> None:
        await shares.acquire(caller, weight)
        served.append(number)

    for number, (step, caller, weight, choice) in enumerate(steps):
        waiting = [known for known in calls if known not in served]
        held = [known for known in calls if known in served]
        if step == "acquire":
            calls[number] = caller, weight, asyncio.create_task(acquire(number, caller, weight))
            model.acquire(number, caller, weight)
        elif step == "release" and held:
            owner, its_weight, _ = calls.pop(held[choice % len(held)])
            shares.release(owner, its_weight)
            model.release(owner, its_weight)
        elif step == "cancel" and waiting:
            leaving = waiting[choice % len(waiting)]
            owner, _, task = calls.pop(leaving)
            task.cancel()
            model.leave(leaving, owner)
        await until_idle()
        assert served == model.served
        assert shares.free == model.free
    for known, (owner, weight, task) in calls.items():
        task.cancel()
        if known in served:
            shares.release(owner, weight)
    await asyncio.gather(*(task for _, _, task in calls.values()), return_exceptions=True)
    # Some were served by what was released just now, and have ended since.
    assert shares.free + sum(shares.held(caller) for caller in CALLERS) == size


@given(st.lists(st.sampled_from(CALLERS), max_size=30))
def test_queue_serves_callers_in_turn(puts: list[str]) -> None:
    """The items of one caller keep their order; the number of items is known."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    expected: dict[str, deque[tuple[str, int]]] = {}
    for number, caller in enumerate(puts):
        queue.put(caller, (caller, number))
        expected.setdefault(caller, deque()).append((caller, number))
    rounds = []
    while any(expected.values()):
        rounds += [items.popleft() for items in expected.values() if items]
    assert len(queue) == len(puts)
    assert sorted(queue) == sorted(rounds)
    assert [queue.get() for _ in puts] == rounds


def test_queue_drops_unwanted_items() -> None:
    """It returns all others when it is cleared."""
    queue: FairQueue[int] = FairQueue()
    for number in range(6):
        queue.put("ada" if number < 2 else "alan", number)
    queue.discard(lambda number: number in {0, 1, 3})
    assert (len(queue), queue.clear(), len(queue)) == (3, [2, 4, 5], 0)
