"""Consistency: reads on replicas see the writes of the same channel."""

from collections.abc import Callable, Coroutine, Iterable
from threading import Lock
from typing import Any, TypeVar

import grpc
from grpc.aio import ClientCallDetails, Metadata

from roster.consistency import ANY, KEY, PRIMARY, READ_PREFIXES

CONTRACT = "/roster.v1."
NOT_WRITES = (*READ_PREFIXES, "Verify")

ResultT = TypeVar("ResultT")


class Consistency:
    """The state that the reads of a channel must see: at first `token`, later each write of the channel too.

    `token` is the one of another process, so that reads see what that process wrote, or `any`: then they
    accept any replica, and no write changes that. By default the primary answers reads until the first write.
    A server without replicas sends no tokens, and is sent none.

    One object may serve several channels. Its `token` is for other processes: give it to them with the task
    that depends on the writes.
    """

    def __init__(self, token: str = "") -> None:
        self.token = token
        self._lock = Lock()
        self._ended = 0  # writes
        self._newest = 0  # the number of writes that had ended when the token arrived

    def begin(self) -> int:
        """Note that a write begins, and return what to pass on when it ends."""
        return self._ended

    def end(self, metadata: Any, began: int) -> None:
        """Take the token from the trailing metadata of a write that has ended.

        A write without a token may have happened or not. Then only the primary's answers are certain to be
        newer, until the token of a write that begins later.
        """
        if self.token == ANY:
            return
        token = str(dict(metadata or ()).get(KEY, PRIMARY))
        with self._lock:  # threads share a blocking channel
            self._ended += 1
            # A write that began after the last token arrived has a newer one, even if a failover or a restore
            # made it smaller. Of writes at the same time, the greater token is the newer.
            if began >= self._newest or token > self.token:
                self.token = token
                self._newest = self._ended

    def require(self, details: ClientCallDetails) -> ClientCallDetails:
        """Return the details of a read with the token, unless the caller has set one."""
        metadata = Metadata(*self.with_token(details.metadata))
        return ClientCallDetails(
            details.method, details.timeout, metadata, details.credentials, details.wait_for_ready
        )

    def with_token(self, metadata: Iterable[tuple[str, Any]] | None) -> list[tuple[str, Any]]:
        """Return the metadata of a read with the token, unless the caller has set one."""
        own = list(metadata or ())
        if self.token in ("", PRIMARY) or any(key == KEY for key, _ in own):
            return own
        return [*own, (KEY, self.token)]


def is_read(method: str | bytes) -> bool:
    """Return whether a replica may answer an RPC, given its path."""
    return _name(method).startswith(READ_PREFIXES)


def is_write(method: str | bytes) -> bool:
    """Return whether an RPC writes, given its path."""
    name = _name(method)
    return bool(name) and not name.startswith(NOT_WRITES)


def _name(method: str | bytes) -> str:
    """Return the name of an RPC of the contract, "" for any other, such as a health check."""
    path = method.decode() if isinstance(method, bytes) else method
    return path.rpartition("/")[2] if path.startswith(CONTRACT) else ""


class BulkMethod:
    """A bulk RPC whose calls give their tokens to the channel when they end.

    It takes the place of an interceptor: grpc.aio would pass each message through a task.
    """

    def __init__(self, method: Any, consistency: Consistency) -> None:
        self._method = method
        self._consistency = consistency

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        began = self._consistency.begin()
        call = self._method(*arguments, **options)
        call.add_done_callback(lambda ended: self._consistency.end(_result(ended.trailing_metadata()), began))
        return call


def watch_bulk_methods(connection: grpc.aio.Channel, consistency: Consistency) -> None:
    """Make the bulk RPCs of a channel give their tokens to it."""
    make: Callable[..., Any] = connection.stream_stream

    def stream_stream(method: str, *arguments: Any, **options: Any) -> Any:
        made = make(method, *arguments, **options)
        return BulkMethod(made, consistency) if is_write(method) else made

    connection.stream_stream = stream_stream  # type: ignore[method-assign]


def _result(of_ended_call: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Return the result of a coroutine of a call that has ended, which does not suspend."""
    try:
        of_ended_call.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("the call has not ended")
