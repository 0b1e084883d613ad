"""Errors of handlers: the status that callers get, and what is logged."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from grpc import StatusCode

from roster import errors
from roster.errors import InvalidField, RosterError, Violation
from roster.errors.codes import status_code
from service.interceptors.chain import Chain, Context
from service.interceptors.errors import answer_errors
from service.interceptors.messages import Messages
from tests.support.errors import Refusal, refusal

SECRET = "postgresql://roster:hunter2@db/roster"
OPAQUE = "internal error; the server's log has the details"
# A call that gets no status would wait so long.
TIMEOUT_SECONDS = 10


async def fails(request: Any, context: Context) -> Empty:
    raise ValueError(SECRET)


async def cancels(request: Any, context: Context) -> Empty:
    raise asyncio.CancelledError(SECRET)


async def fails_in_a_group(request: Any, context: Context) -> Empty:
    async with asyncio.TaskGroup() as tasks:
        await asyncio.wait({tasks.create_task(fails(request, context))})
    return Empty()


async def fails_before_it_answers(request: Any, context: Context) -> AsyncIterator[Empty]:
    yield await fails(request, context)


async def fails_between_answers(request: Any, context: Context) -> AsyncIterator[Empty]:
    yield Empty()
    raise ValueError(SECRET)


async def cancels_between_answers(request: Any, context: Context) -> AsyncIterator[Empty]:
    yield Empty()
    raise asyncio.CancelledError(SECRET)


async def refuses(request: Any, context: Context) -> Empty:
    raise errors.Overloaded("too much at once", field="user", seconds=7)


async def refuses_between_answers(request: Any, context: Context) -> AsyncIterator[Empty]:
    yield Empty()
    raise errors.Overloaded("too much at once", field="user", seconds=7)


async def has_much_to_say(request: Any, context: Context) -> Empty:
    raise InvalidField.of([Violation(f"ids[{number}]", "é" * 100) for number in range(400)])


FAILING_UNARY = [fails, fails_in_a_group]
FAILING_STREAM = [fails_before_it_answers, fails_between_answers]
KINDS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


@asynccontextmanager
async def serving(kind: str, behaviour: Any) -> AsyncIterator[Callable[..., Any]]:
    """Serve one method with the interceptor, and yield a function that calls it."""
    handler = KINDS[kind](behaviour, Empty.FromString, Empty.SerializeToString)
    chain = Chain(answer_errors, Messages().intercept)
    chain.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Service", {"Call": handler}),))
    server = grpc.aio.server(handlers=[chain])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = getattr(channel, kind)("/test.Service/Call")
        yield stub
    await server.stop(grace=None)


async def refusal_at_end(kind: str, behaviour: Any) -> Refusal:
    """Read all responses, and return the final status."""
    request = iter([b""]) if kind.startswith("stream") else b""
    async with serving(kind, behaviour) as stub:
        call = stub(request, timeout=TIMEOUT_SECONDS)
        if kind.endswith("unary"):
            return await refusal(call)
        return await refusal(read_all(call))


async def read_all(call: Any) -> list[bytes]:
    return [answer async for answer in call]


@pytest.mark.parametrize("kind", KINDS)
async def test_unexpected_exception_is_logged_and_hidden_from_callers(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """No class name, text or address gets out, before or after the first response."""
    for behaviour in FAILING_UNARY if kind.endswith("unary") else FAILING_STREAM:
        caplog.clear()
        refused = await refusal_at_end(kind, behaviour)

        assert (refused.code, refused.message, refused.reason) == (StatusCode.INTERNAL, OPAQUE, "INTERNAL")
        assert refused.status.message == OPAQUE
        assert b"hunter2" not in refused.status.SerializeToString()
        (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert record.getMessage() == "/test.Service/Call failed"
        assert f"ValueError: {SECRET}" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_unrequested_cancellation_gets_a_status(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Otherwise grpc.aio would send none, and the caller would wait for its deadline."""
    refused = await refusal_at_end(kind, cancels if kind.endswith("unary") else cancels_between_answers)

    assert (refused.code, refused.message) == (StatusCode.INTERNAL, OPAQUE)
    assert "was cut off by a cancellation inside" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
async def test_domain_error_gets_its_status_and_details(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Reason, facts and retry delay; it is not logged as an error."""
    refused = await refusal_at_end(kind, refuses if kind.endswith("unary") else refuses_between_answers)

    assert (refused.code, refused.message) == (StatusCode.UNAVAILABLE, "too much at once")
    assert (refused.reason, refused.facts, refused.retry_seconds) == ("OVERLOADED", {"seconds": "7"}, 1)
    assert refused.fields == []
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
async def test_cancelled_call_runs_its_finally_immediately(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It leaves no session open and nothing in the log."""
    started, ended = asyncio.Event(), asyncio.Event()

    async def wait(request: Any, context: Context) -> Empty:
        try:
            started.set()
            await asyncio.Event().wait()
        finally:
            ended.set()
        return Empty()

    async def wait_between_answers(request: Any, context: Context) -> AsyncIterator[Empty]:
        yield Empty()
        yield await wait(request, context)

    async with serving(kind, wait if kind.endswith("unary") else wait_between_answers) as stub:
        call = stub() if kind.startswith("stream") else stub(b"")
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await started.wait()
            call.cancel()
            await ended.wait()

    assert not caplog.records


async def test_handler_ends_when_a_slow_reader_leaves() -> None:
    """The `finally` around a `yield` runs even if the response could not be sent."""
    ended = asyncio.Event()

    async def pour(requests: Any, context: Context) -> AsyncIterator[Empty]:
        try:
            while True:
                yield Empty()
        finally:
            ended.set()

    async with serving("stream_stream", pour) as stub:
        call = stub()
        assert await call.read() == b""
        call.cancel()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await ended.wait()


async def test_violations_are_truncated_to_the_trailer_limit() -> None:
    """400 of 200 bytes would end the call with RESOURCE_EXHAUSTED."""
    refused = await refusal_at_end("unary_unary", has_much_to_say)

    assert (refused.code, refused.reason) == (StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refused.fields == [f"ids[{number}]" for number in range(len(refused.fields))]
    assert 20 < len(refused.fields) <= 50


STATUSES: Mapping[type[RosterError], StatusCode] = {
    errors.InvalidField: StatusCode.INVALID_ARGUMENT,
    errors.InvalidMask: StatusCode.INVALID_ARGUMENT,
    errors.InvalidFilter: StatusCode.INVALID_ARGUMENT,
    errors.InvalidOrder: StatusCode.INVALID_ARGUMENT,
    errors.InvalidPageToken: StatusCode.INVALID_ARGUMENT,
    errors.InvalidOptions: StatusCode.INVALID_ARGUMENT,
    errors.InvalidToken: StatusCode.INVALID_ARGUMENT,
    errors.MalformedMessage: StatusCode.INVALID_ARGUMENT,
    errors.TooLarge: StatusCode.INVALID_ARGUMENT,
    errors.UserNotFound: StatusCode.NOT_FOUND,
    errors.PostNotFound: StatusCode.NOT_FOUND,
    errors.LoadNotFound: StatusCode.NOT_FOUND,
    errors.ServiceNotFound: StatusCode.NOT_FOUND,
    errors.AuthorNotFound: StatusCode.FAILED_PRECONDITION,
    errors.EmailTaken: StatusCode.ALREADY_EXISTS,
    errors.IdTaken: StatusCode.ALREADY_EXISTS,
    errors.RequestIdReused: StatusCode.ALREADY_EXISTS,
    errors.VersionMismatch: StatusCode.ABORTED,
    errors.LoadFenced: StatusCode.ABORTED,
    errors.OffsetGap: StatusCode.OUT_OF_RANGE,
    errors.TokenExpired: StatusCode.OUT_OF_RANGE,
    errors.UserHasPosts: StatusCode.FAILED_PRECONDITION,
    errors.UnreadableHash: StatusCode.FAILED_PRECONDITION,
    errors.OptionsChanged: StatusCode.FAILED_PRECONDITION,
    errors.LoadFinished: StatusCode.FAILED_PRECONDITION,
    errors.LoadAborted: StatusCode.FAILED_PRECONDITION,
    errors.LoadExpired: StatusCode.FAILED_PRECONDITION,
    errors.TooManyFailures: StatusCode.FAILED_PRECONDITION,
    errors.FeedReset: StatusCode.FAILED_PRECONDITION,
    errors.RateLimited: StatusCode.RESOURCE_EXHAUSTED,
    errors.QuotaExceeded: StatusCode.RESOURCE_EXHAUSTED,
    errors.PoolExhausted: StatusCode.UNAVAILABLE,
    errors.Overloaded: StatusCode.UNAVAILABLE,
    errors.DatabaseUnavailable: StatusCode.UNAVAILABLE,
    errors.Draining: StatusCode.UNAVAILABLE,
    errors.Unauthenticated: StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied: StatusCode.PERMISSION_DENIED,
    errors.StatementTimeout: StatusCode.DEADLINE_EXCEEDED,
    errors.Unsupported: StatusCode.UNIMPLEMENTED,
    # Not UNAVAILABLE, which clients retry by themselves: the write may be stored.
    errors.OutcomeUnknown: StatusCode.INTERNAL,
}


def with_reasons(kind: type[RosterError]) -> set[type[RosterError]]:
    """Return the error types below a type that have their own reason, without those of the client."""
    ours = (each for each in kind.__subclasses__() if each.__module__ == errors.__name__)
    found = {each for each in ours if "reason" in vars(each)}
    return found.union(*(with_reasons(each) for each in kind.__subclasses__()))


def test_table_has_every_reason() -> None:
    """New reasons need their code here."""
    assert set(STATUSES) == with_reasons(RosterError)


@pytest.mark.parametrize(("kind", "code"), STATUSES.items())
def test_every_reason_has_its_code(kind: type[RosterError], code: StatusCode) -> None:
    """As in the table of the contract; exactly the retryable ones have a delay."""
    assert status_code(kind("no")) == code
    may_retry = code in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED)
    assert (kind.retry_after_seconds is not None) == may_retry
