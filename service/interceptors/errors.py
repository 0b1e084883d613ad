"""Every failed call gets a status: the domain error's, or an opaque INTERNAL."""

import asyncio
import logging
from typing import Any, NoReturn

import grpc
from google.rpc.status_pb2 import Status

from service.errors import RosterError
from service.interceptors.chain import Around, Context, Proceed
from service.status import CODES, status_from_error

log = logging.getLogger(__name__)


class Errors(Around):
    """The outermost interceptor: a caller gets a status with details, or an opaque INTERNAL."""

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        try:
            return await proceed(request, context)
        except RosterError as error:
            status = status_from_error(error)
        except grpc.aio.AbortError:  # health's own answer
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this call. Without a status the caller would wait for its deadline.
            log.exception("%s was cut off by a cancellation inside", method)
            status = _opaque()
        except Exception:
            log.exception("%s failed", method)
            status = _opaque()
        # Not inside `except`: the context keeps what `abort` raises, that would keep the error, and its
        # traceback the request, until the garbage collector finds the circle.
        return await _abort(context, status)


async def _abort(context: Context, status: Status) -> NoReturn:
    await context.abort(
        CODES[status.code],
        status.message,
        trailing_metadata=(("grpc-status-details-bin", status.SerializeToString()),),
    )


def _opaque() -> Status:
    return status_from_error(RosterError("internal error; the server's log has the details"))
