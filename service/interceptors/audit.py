"""The audit log: one line for each write, with who, what, which and how it ended; never what was written."""

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

from roster.v1.bulk_pb2 import BulkWriteResponse
from service.auth.caller import current_caller
from service.errors import RosterError
from service.interceptors.around import Around, Context
from service.loads.model import COUNTED

log = logging.getLogger("roster.audit")
# Whatever ROSTER_LOG_LEVEL says: a logger's own level goes before the root's.
log.setLevel(logging.INFO)

# The writes, each with the path of its target in the request, "" where only the answer knows it.
TARGETS = {
    "/roster.v1.UserService/CreateUser": "",
    "/roster.v1.UserService/UpdateUser": "user.id",
    "/roster.v1.UserService/DeleteUser": "id",
    "/roster.v1.UserService/BulkCreateUsers": "",
    "/roster.v1.UserService/BulkUpdateUsers": "",
    "/roster.v1.PostService/CreatePost": "",
    "/roster.v1.PostService/UpdatePost": "post.id",
    "/roster.v1.PostService/DeletePost": "id",
    "/roster.v1.PostService/BulkCreatePosts": "",
    "/roster.v1.PostService/BulkUpdatePosts": "",
    "/roster.v1.BulkService/AbortBulkLoad": "load_id",
}


@dataclass
class Entry:
    """The fields of one line; the counts are of the rows that this stream was the first to settle."""

    caller: str
    method: str
    target: int | str
    counts: dict[str, int] = field(default_factory=dict)
    outcome: str = "OK"

    def note(self, answer: Any) -> None:
        """Take from an answer what the request did not tell."""
        if not isinstance(answer, BulkWriteResponse):
            self.target = self.target or getattr(answer, "id", "")
        elif answer.HasField("opened"):
            self.target = answer.opened.load_id
        elif answer.HasField("ack") and not answer.ack.replayed:
            self.counts = {name: self.counts.get(name, 0) + getattr(answer.ack, name) for name in COUNTED}


class Audit(Around):
    """Logs the writes of callers who may write; the innermost, so that it sees messages parsed."""

    def wrap(self, method: str, handler: Any) -> Any:
        if method not in TARGETS:
            return handler
        if handler.stream_stream:
            return handler._replace(stream_stream=_stream(method, handler.stream_stream))
        return handler._replace(unary_unary=_call(method, handler.unary_unary))


def _call(method: str, behaviour: Callable[..., Awaitable[Any]]) -> Any:
    target = attrgetter(TARGETS[method]) if TARGETS[method] else lambda _: ""

    async def audited(request: Any, context: Context) -> Any:
        with _logged(method, target(request)) as entry:
            answer = await behaviour(request, context)
            entry.note(answer)
            return answer

    return audited


def _stream(method: str, behaviour: Callable[..., AsyncGenerator[Any]]) -> Any:
    async def audited(requests: Any, context: Context) -> AsyncIterator[Any]:
        with _logged(method, "") as entry:
            async with aclosing(behaviour(requests, context)) as events:
                async for event in events:
                    entry.note(event)
                    yield event

    return audited


@contextmanager
def _logged(method: str, target: int | str) -> Iterator[Entry]:
    """Write the line at the end, however it comes."""
    entry = Entry(current_caller().identity, method, target)
    try:
        yield entry
    except RosterError as error:
        entry.outcome = error.reason
        raise
    except BaseException as error:
        entry.outcome = "INTERNAL" if isinstance(error, Exception) else "CANCELLED"
        raise
    finally:
        line = "%(method)s of %(target)r by %(caller)r: %(outcome)s %(counts)s"
        log.info(line, fields := asdict(entry), extra={"fields": fields})
