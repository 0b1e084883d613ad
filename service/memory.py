"""Gives memory that was freed back to the system."""

import asyncio
import ctypes
from pathlib import Path

# It takes up to 20 ms, in a thread of its own, where much is free in small pieces.
EVERY_SECONDS = 10
WORTH_BYTES = 32 << 20
PAGE_BYTES = 4096


async def trim_forever() -> None:
    """Return freed memory to the system while the process has more than at its start.

    The C library keeps what gRPC's threads free, for themselves: after a burst of large messages hundreds of
    MiB. Does nothing where the library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    usual = _resident_bytes()
    while trim:
        await asyncio.sleep(EVERY_SECONDS)
        if _resident_bytes() > usual + WORTH_BYTES:
            await asyncio.to_thread(trim, 0)


def _resident_bytes() -> int:
    """Return what the process has in memory (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
