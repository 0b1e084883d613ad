"""Observes every call from the outside: counts it, times it, and logs it."""

import asyncio
import logging
from collections.abc import Callable
from contextvars import Context as Variables
from functools import partial
from time import perf_counter

from service.auth.caller import current_caller
from service.interceptors.chain import Context, Interceptor, Proceed, Request, Response, Rpc, code_at_end
from service.interceptors.logs import CallLog
from service.interceptors.metrics import CallMetrics
from service.logs import CALL_IDS

log = logging.getLogger(__name__)


class Afterwards:
    """Runs functions at the end of an iteration of the event loop, when the responses are on their way.

    What is done for several calls one after the other takes half as long as between the calls, whose code
    displaces it in the caches of the processor.
    """

    def __init__(self) -> None:
        self._functions: list[Callable[[], None]] = []

    def add(self, function: Callable[[], None]) -> None:
        """Run a function later, in an empty context."""
        if not self._functions:
            asyncio.get_running_loop().call_soon(self._run, context=Variables())
        self._functions.append(function)

    def _run(self) -> None:
        functions, self._functions = self._functions, []
        for function in functions:
            try:
                function()
            except Exception:
                log.exception("a call could not be counted or logged")


def observe_calls(slow_seconds: float) -> Interceptor:
    """Return an interceptor for the metrics and the log lines of calls; one reading of the clock serves both.

    It wraps `answer_errors`, which sets the code of a call. A call of more than `slow_seconds` is a warning.
    """
    afterwards = Afterwards()

    def intercept(rpc: Rpc, proceed: Proceed) -> Proceed:
        metrics, log = CallMetrics(rpc, afterwards.add), CallLog(rpc, slow_seconds)

        async def observe(request: Request, context: Context) -> Response:
            statements = log.begin(context)
            metrics.begin()
            began = perf_counter()
            try:
                return await proceed(request, context)
            finally:
                seconds, code = perf_counter() - began, code_at_end(context)
                metrics.end(code, seconds)
                caller, peer = current_caller().identity, context.peer()
                afterwards.add(partial(log.end, code, seconds, statements, CALL_IDS.get(), caller, peer))

        return observe

    return intercept
