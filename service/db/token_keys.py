"""The keys that encrypt page tokens: one for each day, in the database, which all servers share.

A server encrypts with the key of its day. It knows those of the days before and after too, because the clock
of another server, or its own, may be behind or ahead. Keys are deleted after a week. Then nobody can read
their tokens, not even with a copy of the database.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import date, timedelta
from secrets import token_bytes

from sqlalchemy import LargeBinary, delete, select
from sqlalchemy.orm import Mapped, mapped_column

from service.db.base import Base, ReadSession, Session
from service.db.dialect import insert
from service.db.engine import Database
from service.db.servers import runs_before
from service.db.token_cipher import TokenCipher, utc_today

DAY = timedelta(days=1)
KEPT_FOR = 7 * DAY  # after the day of the key
KEY_BYTES = 32  # AES-256
FIRST_REVISION = "0006"  # servers of earlier ones read only tokens that are not encrypted


class TokenKey(Base):
    """The key of the page tokens that are made on a day, in UTC."""

    __tablename__ = "page_token_keys"

    day: Mapped[date] = mapped_column(primary_key=True)
    key: Mapped[bytes] = mapped_column(LargeBinary)


async def delete_old_token_keys(session: Session, today: date) -> None:
    """Delete the keys whose tokens are no longer valid."""
    await session.execute(delete(TokenKey).where(TokenKey.day < today - KEPT_FOR))


async def renew_token_keys(session: Session, today: date) -> None:
    """Create the keys that `_days` returns unless they exist, and delete those that are too old."""
    await delete_old_token_keys(session, today)
    rows = [{"day": day, "key": token_bytes(KEY_BYTES)} for day in _days(today)]
    await session.execute(insert(session, TokenKey).values(rows).on_conflict_do_nothing())


class TokenKeys:
    """Reads the keys for the first token that is encrypted, and then once a day."""

    def __init__(self, database: Database, today: Callable[[], date] = utc_today) -> None:
        self._database = database
        self._today = today
        self._cipher: TokenCipher | None = None

    async def cipher(self) -> TokenCipher:
        """Return the cipher with the current keys; raises the errors of `Database` if it has to read them."""
        today = self._today()
        if not (self._cipher and self._cipher.is_in_use and self._cipher.days >= _days(today)):
            self._cipher = await self._read(today)
        return self._cipher

    async def _read(self, today: date) -> TokenCipher:
        async with self._database.read() as session:
            keys = await _keys(session)
            # During a rolling upgrade, the next page may be asked of a server that can't decrypt its token.
            is_in_use = self._database.is_sqlite or not await session.scalar(runs_before(FIRST_REVISION))
        if not keys.keys() >= _days(today):  # no server has needed them yet
            async with self._database.begin() as session:
                await renew_token_keys(session, today)
                keys = await _keys(session)
        return await asyncio.to_thread(TokenCipher, keys, self._today, is_in_use=is_in_use)


def _days(today: date) -> set[date]:
    """Return the days of which a server needs the keys."""
    return {today - DAY, today, today + DAY}


async def _keys(session: ReadSession) -> Mapping[date, bytes]:
    rows = await session.execute(select(TokenKey.day, TokenKey.key))
    return {row.day: row.key for row in rows}
