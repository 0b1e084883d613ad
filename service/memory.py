"""Garbage collection, and the return of freed memory to the operating system."""

import asyncio
import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A trim takes up to 20 ms, in a thread, if the free memory is in many small pieces.
INTERVAL_SECONDS = 10
MIN_GROWTH_BYTES = 32 << 20
PAGE_BYTES = 4096
YOUNG = 1  # the generations of objects that are younger than the last collections: a few milliseconds


def collect_rarely() -> None:
    """Regard everything loaded so far as permanent, and collect garbage after 20,000 new objects, not 700.

    Without freeze, collections of the oldest generation took 0.6 of the 6 µs that a bulk row costs.
    With the default threshold, collections of the 5,000 rows of each message took another 0.3.
    `roster load` parses a row of CSV in 6 µs, and in 7.6 without this.
    """
    gc.freeze()
    gc.set_threshold(20_000)


@contextmanager
def importing() -> Iterator[None]:
    """Import modules in the block: the garbage collector searches them neither meanwhile nor at the exit.

    With its searches, `roster serve --help` took 0.84 s of CPU, and takes 0.55 without.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


async def trim_forever() -> None:
    """Trim the heap now, and from time to time while the process is larger than at its start.

    glibc keeps freed memory for the thread that freed it: after a burst of large messages, hundreds of MiB
    for gRPC's threads. With another C library this does nothing.

    grpc.aio leaves each refused or cancelled call in a reference cycle, 50 objects, and sometimes its message
    with it. Hundreds of them are too few for the garbage collector to run by itself.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        await asyncio.to_thread(trim, 0)  # of what the imports have left: half a MiB
    at_start = _resident_bytes()
    while trim:
        await asyncio.sleep(INTERVAL_SECONDS)
        if _resident_bytes() > at_start + MIN_GROWTH_BYTES:
            gc.collect(YOUNG)
            await asyncio.to_thread(trim, 0)


def _resident_bytes() -> int:
    """Return the resident set size of the process (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
