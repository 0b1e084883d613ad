"""Returns freed memory to the operating system."""

import asyncio
import ctypes
from pathlib import Path

# A trim takes up to 20 ms, in a thread, if the free memory is in many small pieces.
INTERVAL_SECONDS = 10
MIN_GROWTH_BYTES = 32 << 20
PAGE_BYTES = 4096


async def trim_forever() -> None:
    """Trim the heap now, and from time to time while the process is larger than at its start.

    glibc keeps freed memory for the thread that freed it: after a burst of large messages, hundreds of MiB
    for gRPC's threads. With another C library this does nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)  # of what the imports have left: half a MiB, in a millisecond
    at_start = _resident_bytes()
    while trim:
        await asyncio.sleep(INTERVAL_SECONDS)
        if _resident_bytes() > at_start + MIN_GROWTH_BYTES:
            await asyncio.to_thread(trim, 0)


def _resident_bytes() -> int:
    """Return the resident set size of the process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
