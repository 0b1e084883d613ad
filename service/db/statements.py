"""Times every SQL statement, and reports it to the metrics and to the listeners of the current call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter
from typing import Any

from sqlalchemy import Connection, ExceptionContext, event
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.ext.asyncio import AsyncEngine

from service.metrics import STATEMENTS

Listener = Callable[[str, float], None]  # receives the statement and its seconds
LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("LISTENERS", default=())

_OPERATIONS = ("SELECT", "INSERT", "UPDATE", "DELETE", "COPY")
_BY_OPERATION = {name: STATEMENTS.labels(name.lower()) for name in _OPERATIONS}
_OTHER = STATEMENTS.labels("other")


def measure_statements(engine: AsyncEngine) -> None:
    """Measure every statement that SQLAlchemy executes."""
    event.listen(engine.sync_engine, "before_cursor_execute", _begin)
    event.listen(engine.sync_engine, "after_cursor_execute", _end)
    event.listen(engine.sync_engine, "handle_error", _fail)


@contextmanager
def measure_statement(statement: str) -> Iterator[None]:
    """Measure a statement that the driver executes directly."""
    began = perf_counter()
    try:
        yield
    finally:
        measure(statement, began)


def measure(statement: str, began: float) -> None:
    """Measure a statement that began at this reading of `perf_counter`."""
    seconds = perf_counter() - began
    _BY_OPERATION.get(statement.partition(" ")[0], _OTHER).observe(seconds)
    notify_listeners(statement, seconds)


def _begin(connection: Connection, cursor: DBAPICursor, *rest: Any) -> None:  # noqa: ARG001
    # Of the statement, not of the connection: the one that SQLAlchemy opens first has no `info`.
    _, _, context, _ = rest
    context.roster_began = perf_counter()


def _end(connection: Connection, cursor: DBAPICursor, statement: str, *rest: Any) -> None:  # noqa: ARG001
    _, context, _ = rest
    measure(statement, context.roster_began)


def _fail(failure: ExceptionContext) -> None:
    began = getattr(failure.execution_context, "roster_began", None)
    if failure.statement and began:
        measure(failure.statement, began)


def notify_listeners(statement: str, seconds: float) -> None:
    """Report a statement that the current call waited for."""
    for listener in LISTENERS.get():
        listener(statement, seconds)
