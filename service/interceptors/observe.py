"""Observes every call from the outside: counts it, times it, and logs it."""

from time import perf_counter

from service.interceptors.chain import Context, Interceptor, Proceed, Request, Response, Rpc, code_at_end
from service.interceptors.logs import CallLog, Lines
from service.interceptors.metrics import CallMetrics


def observe_calls(slow_seconds: float) -> Interceptor:
    """Return an interceptor for the metrics and the log lines of calls; one reading of the clock serves both.

    It wraps `answer_errors`, which sets the code of a call. A call of more than `slow_seconds` is a warning.
    """
    lines = Lines()

    def intercept(rpc: Rpc, proceed: Proceed) -> Proceed:
        metrics, log = CallMetrics(rpc), CallLog(rpc, slow_seconds, lines)

        async def observe(request: Request, context: Context) -> Response:
            statements = log.begin(context)
            metrics.begin()
            began = perf_counter()
            try:
                return await proceed(request, context)
            finally:
                seconds, code = perf_counter() - began, code_at_end(context)
                metrics.end(code, seconds)
                log.end(context, code, seconds, statements)

        return observe

    return intercept
