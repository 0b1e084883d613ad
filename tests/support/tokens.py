"""Consistency tokens in the metadata of calls, and the metrics of replicas."""

from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc

from roster.consistency import KEY
from service.metrics import READS, REPLICA_FALLBACKS, REPLICA_WAITS


class Answer(NamedTuple):
    """The response of a call, or its error, and its token; "" if it has none."""

    response: Any
    error: grpc.aio.AioRpcError | None
    token: str


async def answer(call: Any) -> Answer:
    """Return how a call ends; the response of a stream is the list of its messages."""
    response, error = None, None
    try:
        response = await call if isinstance(call, Awaitable) else [message async for message in call]
    except grpc.aio.AioRpcError as failure:
        error = failure
    metadata: Any = await call.trailing_metadata()
    return Answer(response, error, str(dict(metadata or ()).get(KEY, "")))


def at(token: str) -> dict[str, Any]:
    """Return the argument of a call that reads with a token, or with several."""
    return {"metadata": tuple((KEY, each) for each in token.split())}


class Counts(dict[str, float]):
    """Counts by `source=…`, `wait=…` or `fallback=…`; a missing one is 0."""

    def __missing__(self, key: str) -> float:
        return 0


def _counts() -> Counts:
    counters = {"source": READS, "wait": REPLICA_WAITS, "fallback": REPLICA_FALLBACKS}
    found = Counts()
    for name, counter in counters.items():
        for sample in next(iter(counter.collect())).samples:
            [label] = sample.labels.values()
            found[f"{name}={label}"] = sample.value
    return found


@contextmanager
def counted() -> Iterator[Counts]:
    """Yield the counts of the replicas of this process during the block; filled in at its end."""
    before, during = _counts(), Counts()
    yield during
    during.update({key: now - before[key] for key, now in _counts().items() if now != before[key]})
