"""Gives memory that was freed back to the system."""

import asyncio
import ctypes
from pathlib import Path

EVERY_SECONDS = 5
# So much more than after the last time is worth a look at the whole heap, which takes milliseconds.
WORTH_BYTES = 16 << 20
PAGE_BYTES = 4096


async def trim_forever() -> None:
    """Return freed memory to the system whenever the process has grown.

    The C library keeps what gRPC's threads free, for themselves: after a burst of large messages hundreds of
    MiB. Does nothing where the library is not glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    least = _resident_bytes()
    while trim:
        await asyncio.sleep(EVERY_SECONDS)
        if _resident_bytes() > least + WORTH_BYTES:
            await asyncio.to_thread(trim, 0)
            least = _resident_bytes()
        least = min(least, _resident_bytes())


def _resident_bytes() -> int:
    """Return what the process has in memory (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
