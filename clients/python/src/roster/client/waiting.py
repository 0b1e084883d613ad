"""Timeouts for Python 3.10 too: asyncio.timeout came with 3.11."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

ResultT = TypeVar("ResultT")


async def within(seconds: float, work: Awaitable[ResultT]) -> ResultT:
    """Return the result of some work; raises TimeoutError, and cancels it, if it takes longer.

    asyncio.wait_for is no substitute: before Python 3.12, it may return a result although it was cancelled
    (https://github.com/python/cpython/issues/86296).
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
        if not done:
            raise TimeoutError
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif not task.cancelled():
            task.exception()  # nobody else asks for it if the caller was cancelled at the same moment
