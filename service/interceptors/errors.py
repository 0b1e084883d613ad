"""Every failed call gets a status: the domain error's, or an opaque INTERNAL."""

import asyncio
import logging
from typing import NoReturn

import grpc
from google.rpc.status_pb2 import Status

from roster.errors import RosterError
from roster.errors.codes import CODES
from service.interceptors.chain import Context, Proceed, Request, Response, Rpc
from service.status import status_from_error

log = logging.getLogger(__name__)

# What grpc.aio raises, if the client goes away during a write, and the cancellation of the call comes later.
CLIENT_IS_GONE = "ExecuteBatchError"


def answer_errors(rpc: Rpc, proceed: Proceed) -> Proceed:
    """Turn exceptions into statuses; the log has those that are faults of the server."""

    async def answer(request: Request, context: Context) -> Response:
        try:
            return await proceed(request, context)
        except RosterError as error:
            status = status_from_error(error)
        except grpc.aio.AbortError:  # the health service aborts by itself
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this call: grpc.aio would send no status, and the caller would wait for its
            # deadline (grpc#29248).
            log.exception("%s was cut off by a cancellation inside", rpc.path)
            status = _opaque()
        except Exception as error:
            if type(error).__name__ == CLIENT_IS_GONE:
                raise asyncio.CancelledError from None
            log.exception("%s failed", rpc.path)
            status = _opaque()
        # Not inside `except`: the context keeps the exception that `abort` raises. That would keep the error,
        # and its traceback the request, until the garbage collector finds the cycle.
        return await _abort(context, status)

    return answer


async def _abort(context: Context, status: Status) -> NoReturn:
    await context.abort(
        CODES[status.code],
        status.message,
        trailing_metadata=(
            *(context.trailing_metadata() or ()),  # set by other interceptors; `abort` replaces it
            ("grpc-status-details-bin", status.SerializeToString()),
        ),
    )


def _opaque() -> Status:
    return status_from_error(RosterError("internal error; the server's log has the details"))
