"""The keys of page tokens: shared by all servers, one for each day, and kept for a week."""

import asyncio
from datetime import date, timedelta
from uuid import uuid4

import asyncpg
from sqlalchemy import delete, make_url, select

from service.db import revisions
from service.db.engine import Database
from service.db.paging import decode_token, encode_token, fingerprint
from service.db.servers import RunningServer
from service.db.token_keys import DAY, TokenKey, TokenKeys, renew_token_keys
from service.settings import Settings
from service.users.model import User
from tests.support.pgbouncer import direct
from tests.support.rival import until

TODAY = date(2024, 2, 29)
LISTING = fingerprint("users", "", "email", False)


async def days(database: Database) -> list[date]:
    async with database.read() as session:
        return list(await session.scalars(select(TokenKey.day).order_by(TokenKey.day)))


async def renew(database: Database, today: date) -> None:
    async with database.begin() as session:
        await renew_token_keys(session, today)


async def test_servers_that_start_at_once_share_their_keys(database: Database) -> None:
    """Each creates those that are missing; the first one wins."""
    ciphers = await asyncio.gather(*(TokenKeys(database, lambda: TODAY).cipher() for _ in range(3)))

    assert await days(database) == [TODAY + n * DAY for n in (-1, 0, 1)]
    encrypted = [cipher.encrypt(b"text") for cipher in ciphers]
    assert [ciphers[0].decrypt(text) for text in encrypted] == [b"text"] * 3


async def test_server_reads_new_keys_each_day(database: Database) -> None:
    """It still knows those of the days before."""
    today = TODAY
    keys = TokenKeys(database, lambda: today)
    first = await keys.cipher()
    assert await keys.cipher() is first
    encrypted = first.encrypt(b"text")

    today += DAY
    second = await keys.cipher()
    assert second.days == {TODAY + n * DAY for n in (-1, 0, 1, 2)}
    assert second.decrypt(encrypted) == b"text"


async def test_clocks_may_differ_by_a_day(database: Database) -> None:
    """Also on the first day of a database, and if the clock of a server is set back."""
    today = TODAY
    keys, behind = TokenKeys(database, lambda: today), TokenKeys(database, lambda: TODAY - DAY)
    cipher = await keys.cipher()
    assert cipher.decrypt((await behind.cipher()).encrypt(b"text")) == b"text"

    for _ in range(3):
        today -= DAY
        cipher = await keys.cipher()
        assert cipher.decrypt(cipher.encrypt(b"text")) == b"text"


async def test_tokens_are_not_encrypted_while_an_older_server_runs(postgresql_url: str) -> None:
    """It could not read them, and may get the call for the next page. The oldest ones have only sessions."""
    database = Database(Settings(database_url=postgresql_url))
    keys = TokenKeys(database)
    plain = (
        make_url(direct(postgresql_url)).set(drivername="postgresql").render_as_string(hide_password=False)
    )
    session = await asyncpg.connect(plain, server_settings={"application_name": "roster"})
    assert not (await keys.cipher()).is_in_use
    await session.close()
    await until(lambda: is_in_use(keys))
    encrypted = encode_token(LISTING, ["ada@example.org"], await keys.cipher())

    keys = TokenKeys(database)
    async with database.begin() as writer:
        writer.add(RunningServer(id=uuid4(), name="old", release="earlier", revision="0005"))
        writer.add(RunningServer(id=uuid4(), name="new", release="later", revision=revisions.head()))
    cipher = await keys.cipher()
    token = encode_token(LISTING, ["ada@example.org"], cipher)
    assert decode_token(LISTING, token, [User.email]) == ["ada@example.org"]
    assert decode_token(LISTING, encrypted, [User.email], cipher) == ["ada@example.org"]
    async with database.begin() as writer:
        await writer.execute(delete(RunningServer).where(RunningServer.name == "old"))
    assert await is_in_use(keys)
    await database.close()


async def is_in_use(keys: TokenKeys) -> bool:
    return (await keys.cipher()).is_in_use


async def test_keys_are_deleted_after_a_week(database: Database) -> None:
    """Counted from the end of the day on which they were used; renewing keys again changes nothing."""
    await renew(database, TODAY)
    await renew(database, TODAY + timedelta(days=7))
    await renew(database, TODAY + timedelta(days=7))
    assert await days(database) == [TODAY + n * DAY for n in (0, 1, 6, 7, 8)]

    await renew(database, TODAY + timedelta(days=8))
    assert await days(database) == [TODAY + n * DAY for n in (1, 6, 7, 8, 9)]
