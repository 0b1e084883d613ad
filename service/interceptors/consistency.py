"""Consistency: tokens for the callers of writes, and what the tokens of reads require of a replica."""

import asyncio

from roster.consistency import KEY, PRIMARY, READ_PREFIXES
from roster.errors import (
    InvalidArgument,
    Refused,
    ResourceExhausted,
    StatementTimeout,
    Unavailable,
)
from service.consistency import Requirement, Writes, begin_writes, position_from_metadata, set_requirement
from service.db.engine import CancelledAfterCommit
from service.db.position import PrimaryPosition
from service.interceptors.audit import TARGETS
from service.interceptors.chain import Context, Proceed, Request, Response, Rpc
from service.services import RPCS

READS = {path for path, method in RPCS.items() if method.name.startswith(READ_PREFIXES)}
# After these the caller knows nothing of what is stored: nothing was read, or it was not reported.
WITHOUT_STATE = (InvalidArgument, Refused, ResourceExhausted, StatementTimeout, Unavailable)
TOKEN_SECONDS = 0.5


class Consistency:
    """Gives each write a token, and each read what its token requires. Only for servers with replicas.

    A write has its token in the trailing metadata, also if it fails with an error that reports what is
    stored, such as ALREADY_EXISTS, and however a stream ends. The value is `primary` if the outcome of a
    commit is unknown, or if the position of the primary can't be read in half a second, or in half of the
    time that the call has left.
    """

    def __init__(self, primary: PrimaryPosition) -> None:
        self._primary = primary

    def intercept(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        """Add tokens to the answers of a write; read those of a read, which can raise InvalidToken."""
        if rpc.path in READS:
            return _require(proceed)
        if rpc.path in TARGETS:
            return self._add_tokens(rpc, proceed)
        return proceed

    def _add_tokens(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        async def add_token(request: Request, context: Context) -> Response:
            writes = begin_writes()
            try:
                response = await proceed(request, context)
            except Exception as error:
                # Some messages of a stream may be stored, whatever ended it.
                if rpc.is_stream or not isinstance(error, WITHOUT_STATE):
                    await self._add_token(context, writes)
                raise
            try:
                await self._add_token(context, writes)
            except asyncio.CancelledError:
                if getattr(request, "validate_only", False):  # a dry run has stored nothing
                    raise
                # Otherwise a server that stops would ask the client to send the write again.
                raise CancelledAfterCommit from None
            return response

        return add_token

    async def _add_token(self, context: Context, writes: Writes) -> None:
        position = None
        if not writes.is_outcome_unknown:
            left = context.time_remaining()
            seconds = TOKEN_SECONDS if left is None else min(TOKEN_SECONDS, left / 2)
            position = await self._primary.current(seconds)
        context.set_trailing_metadata(((KEY, str(position) if position else PRIMARY),))


def _require(proceed: Proceed) -> Proceed:
    async def require(request: Request, context: Context) -> Response:
        values = [str(value) for key, value in context.invocation_metadata() or () if key == KEY]
        position = position_from_metadata(values) if values else None
        if position:
            left = context.time_remaining()
            deadline = None if left is None else asyncio.get_running_loop().time() + left
            set_requirement(Requirement(position, deadline))
        return await proceed(request, context)

    return require
