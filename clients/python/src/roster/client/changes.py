"""Watches of the change feed that continue after the loss of a connection or of a server."""

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

import grpc

from roster.client.backoff import Backoff
from roster.client.errors import Disconnected, error_from_call
from roster.client.waiting import within
from roster.errors import RosterError, StatementTimeout
from roster.v1.changes_pb2 import Change, WatchChangesRequest, WatchChangesResponse
from roster.v1.changes_pb2_grpc import ChangeServiceStub

# The server sends a response at least every 10 s. A proxy may keep a connection to a server that is gone.
SILENCE_SECONDS = 35.0


async def watch_changes(
    connection: grpc.aio.Channel,
    token: str = "",
    entities: Iterable[Change.Entity.ValueType] = (),
    *,
    backoff: Backoff | None = None,
    silence_seconds: float = SILENCE_SECONDS,
) -> AsyncGenerator[WatchChangesResponse, None]:
    """Yield the responses of WatchChanges, without end, from a token on; without one, from now on.

    Store the changes of a response together with its token before you ask for the next one, then no change
    is lost or applied to an older state: after a restart, pass the stored token. If you leave the iteration
    early, close it (`contextlib.aclosing`): that cancels the call.

    A watch that breaks with an error that a retry can fix continues with the last token, after a pause. By
    default there is no limit to the retries, but if no server has answered yet, Disconnected is raised: the
    address may be wrong. Another `backoff` sets other limits. A server that sends nothing for
    `silence_seconds` counts as lost.

    Raises FeedReset and TokenExpired if the feed does not continue at the token: make a new copy from an
    export. Raises other errors that a retry can't fix, such as InvalidField, PermissionDenied, Unsupported.
    """
    stub = ChangeServiceStub(connection)
    backoff = backoff or Backoff(max_retries=sys.maxsize)
    backoff.watch(connection)
    entities = list(entities)
    while True:
        call = stub.WatchChanges(WatchChangesRequest(entities=entities, token=token))
        try:
            async with aclosing(_responses(call, silence_seconds)) as responses:
                async for response in responses:
                    token = response.token
                    backoff.reset()
                    yield response
            raise Disconnected("the server ended the watch without an error")
        except RosterError as error:
            if isinstance(error, StatementTimeout):  # the next statement may be faster
                error.retry_after_seconds = 0.0
            await backoff.wait(error)


async def _responses(
    call: "grpc.aio.UnaryStreamCall[WatchChangesRequest, WatchChangesResponse]", silence_seconds: float
) -> AsyncGenerator[WatchChangesResponse, None]:
    """Yield the responses of one call; raises RosterError."""
    responses: AsyncIterator[Any] = aiter(call)
    try:
        while True:
            response = await within(silence_seconds, anext(responses, None))
            if response is None:
                return
            yield response
    except TimeoutError:
        raise Disconnected(f"the server has sent nothing for {silence_seconds:g} s") from None
    except grpc.aio.AioRpcError as error:
        raise error_from_call(error) from None
    finally:
        call.cancel()
