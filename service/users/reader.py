"""UserReader: single users, many concurrent look-ups in one statement."""

from collections.abc import Mapping, Sequence
from typing import Any

from service.db.engine import Database
from service.db.reads import LookupBatcher
from service.db.repository import shown
from service.users.model import User
from service.users.repository import UserRepository

CREDENTIALS = (User.id, User.email, User.hashed_password, User.is_active)


class UserReader:
    """Users by id or by normalised e-mail."""

    def __init__(self, database: Database) -> None:
        self._loop_turns = database.loop_turns
        keys = {int: User.id, str: User.email}
        self._users = {kind: LookupBatcher(database, key, shown(User)) for kind, key in keys.items()}
        # A single look-up does not wait until a thousand rows are read.
        self._batches = LookupBatcher(database, User.id, shown(User))
        self._credentials = {kind: LookupBatcher(database, key, CREDENTIALS) for kind, key in keys.items()}

    async def get(self, key: int | str) -> Any:
        """Return a user's columns, but for the hash; raises UserNotFound."""
        user = await self._users[type(key)].get(key)
        if user is None:
            raise UserRepository.missing()
        return user

    async def get_many(self, ids: Sequence[int]) -> Mapping[int, Any]:
        """Return users' columns by id, of those that are there; there may be others."""
        found = await self._batches.get_many(ids)
        await self._loop_turns.next(len(ids))
        return found

    async def password_hash(self, key: int | str) -> tuple[int, str]:
        """Return id and hash of an active user with a password, otherwise (0, "")."""
        found = await self._credentials[type(key)].get(key)
        if found and found.is_active and found.hashed_password:
            return found.id, found.hashed_password
        return 0, ""

    async def close(self) -> None:
        """End what is under way."""
        for gather in (*self._users.values(), self._batches, *self._credentials.values()):
            await gather.close()
