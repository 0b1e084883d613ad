"""Passwords: argon2id in a few threads, so that hashing never holds up the event loop."""

import asyncio
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from secrets import token_bytes
from typing import TypeVar

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from service.errors import Overloaded
from service.metrics import HASHING, HASHING_REFUSED

T = TypeVar("T")


class Passwords:
    """Hashes and checks passwords; raises Overloaded where too many wait already."""

    def __init__(self, workers: int, queue: int) -> None:
        self._hasher = PasswordHasher()  # argon2id with the second recommendation of RFC 9106
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="password")
        self._free = queue
        # Checked where there is no hash, so that an unknown user costs what a known one does.
        self._nobody = _hash_of_nothing(self._hasher)

    async def hash(self, password: str) -> str:
        """Return the hash of a new password in PHC form."""
        return await self._run(lambda: self._hasher.hash(password))

    async def verify(self, stored: str, password: str) -> bool:
        """Tell whether the password is the stored hash's; "" is nobody's, at the same cost."""
        matches = await self._run(lambda: self._matches(stored or self._nobody, password))
        return matches and bool(stored)

    def is_weak(self, stored: str) -> bool:
        """Tell whether a hash was made with other parameters than today's."""
        return self._hasher.check_needs_rehash(stored)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _matches(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, password)
        except (VerificationError, InvalidHashError):
            return False

    async def _run(self, work: Callable[[], T]) -> T:
        if not self._free:
            HASHING_REFUSED.inc()
            raise Overloaded("too many passwords are being hashed; nothing was done, try again")
        self._free -= 1
        HASHING.inc()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._free += 1
            HASHING.dec()


def _hash_of_nothing(hasher: PasswordHasher) -> str:
    """Return a hash that no password has, with the hasher's costs; a real one would delay the start."""
    costs = f"m={hasher.memory_cost},t={hasher.time_cost},p={hasher.parallelism}"
    salt, digest = (
        b64encode(token_bytes(size)).decode().rstrip("=") for size in (hasher.salt_len, hasher.hash_len)
    )
    return f"$argon2id$v=19${costs}${salt}${digest}"
