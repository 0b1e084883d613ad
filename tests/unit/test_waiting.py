"""Timeouts of the client."""

import asyncio
import gc
from typing import Any

from roster.client.waiting import within


async def cancel_while_work_fails() -> None:
    failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def fail() -> None:
        await failure

    waiting = asyncio.create_task(within(5, fail()))
    await asyncio.sleep(0.01)
    failure.set_exception(ValueError("too late"))
    waiting.cancel()
    await asyncio.wait({waiting})
    assert waiting.cancelled()


async def test_failure_at_the_moment_of_a_cancellation_is_not_reported() -> None:
    """The caller is gone, and asyncio would log that nobody has asked for the error."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))

    await cancel_while_work_fails()
    gc.collect()

    assert reported == []
