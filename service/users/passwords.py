"""Hashes passwords with argon2id in a few threads, so that hashing never blocks the event loop.

Callers share the threads fairly: one with a thousand checks, or with expensive ones, leaves a thread to the
others, unless there is only one.
"""

import asyncio
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from secrets import token_bytes
from typing import TypeVar

from argon2 import PasswordHasher

from roster.errors import Overloaded
from service.auth.caller import current_share
from service.metrics import HASHING, HASHING_REFUSED
from service.settings import Settings
from service.shares import FairSemaphore
from service.users.hashes import matches, read_hash
from service.users.schemes import ARGON2_1_3, Argon2Hash, HashError, PasswordHash

T = TypeVar("T")


class Passwords:
    """Hashes and checks passwords; raises Overloaded if too many of the same caller are waiting."""

    def __init__(self, settings: Settings) -> None:
        self._hasher = PasswordHasher(
            settings.password_passes, settings.password_memory, settings.password_lanes
        )
        self._threads = ThreadPoolExecutor(settings.password_workers, thread_name_prefix="password")
        self._shares = FairSemaphore(settings.password_workers)
        self._queue = settings.password_queue
        # Checked if there is no hash, so that an unknown user costs as much time as a known one.
        self._nobody = _hash_of_nothing(self._hasher)

    async def hash(self, password: str) -> str:
        """Return the hash of a new password in PHC form."""
        return await self._run(lambda: self._hasher.hash(password))

    async def check(self, stored: str, password: str) -> tuple[bool, str | None]:
        """Return whether the password matches, and a stronger hash if it does and the stored one is weak.

        An empty hash matches no password, at the same cost. A weak hash costs one more, matching or not.
        Raises HashError for a hash that can't be checked, after as much work as for one that can.
        """
        return await self._run(lambda: self._check(stored, password))

    def close(self) -> None:
        """Cancel waiting work and let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check(self, stored: str, password: str) -> tuple[bool, str | None]:
        try:
            known = read_hash(stored or self._nobody)
            is_valid = known.verify(password.encode())
        except HashError:
            matches(self._nobody, password)
            raise
        if not self._is_weak(known):
            return is_valid, None
        if is_valid:
            return True, self._hasher.hash(password)
        return matches(self._nobody, password), None

    def _is_weak(self, known: PasswordHash) -> bool:
        """Return whether a hash is of another kind, or has less memory or time, than new hashes."""
        return not (
            isinstance(known, Argon2Hash)
            and (known.kind, known.version) == ("argon2id", ARGON2_1_3)
            and known.memory >= self._hasher.memory_cost
            and known.passes >= self._hasher.time_cost
        )

    async def _run(self, work: Callable[[], T]) -> T:
        caller = current_share()
        if self._shares.held(caller) + self._shares.waiting(caller) >= self._queue:
            HASHING_REFUSED.inc()
            raise Overloaded(
                f"{self._queue} passwords of this caller are waiting already; nothing was done, try again"
            )
        with HASHING.track_inprogress():
            await self._shares.acquire(caller)
            hashing = asyncio.get_running_loop().run_in_executor(self._threads, work)
            # A thread can't be interrupted: it stays busy to the end, even if the call was cancelled.
            hashing.add_done_callback(lambda _: self._shares.release(caller))
            return await asyncio.shield(hashing)


def _hash_of_nothing(hasher: PasswordHasher) -> str:
    """Return a hash that matches no password, with the hasher's costs; a real one would delay the start."""
    costs = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    salt, digest = (
        b64encode(token_bytes(size)).decode().rstrip("=") for size in (hasher.salt_len, hasher.hash_len)
    )
    return f"$argon2id$v=19${costs}${salt}${digest}"
