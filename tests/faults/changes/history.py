"""Random concurrent histories on PostgreSQL, and the proof that mirrors of the feed miss nothing in them.

Writers run a thousand operations while followers read the feed. Two transactions stay open all the while. In
the end, while one of them still is, each mirror must be equal to the tables; then it commits, and they must
be equal again.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import asyncpg
import grpc
from sqlalchemy import make_url

from roster.v1.changes_pb2 import Change, ListChangesRequest, WatchChangesRequest
from service.changes.prune import prune_changes
from service.server import utc_now
from tests.faults.changes.followers import Follower, Stubs
from tests.faults.changes.mirror import PROBE, TABLES, RowKey, Rows, select_rows
from tests.faults.changes.watcher import StoredMirror, Watcher
from tests.faults.changes.writers import BROKEN, LOCK_TIMEOUT, CallWriter, Plan, SqlWriter
from tests.faults.crash import MortalServer
from tests.support.postgres import PostgresServer
from tests.support.server import serve

OPERATIONS = 1000
OPEN_SECONDS = 5
STUCK_SECONDS = 4  # without progress; then a mirror will never be equal to the tables
LAG_SECONDS = 15  # of a watch, in the traffic of several histories on a slow machine
LIVE_SECONDS = 1
PROBE_SECONDS = 0.25
PRUNE_SECONDS = 0.05
KEPT_SECONDS = 2.5  # less than the oldest transactions are open
SQL_WRITERS, CALL_WRITERS = 5, 4
LIMITS = {"lock_timeout": LOCK_TIMEOUT}
EVERYTHING = (Change.USERS, Change.POSTS)
FOLLOWERS = (
    (EVERYTHING, ["watch"]),
    (EVERYTHING, ["list"]),
    (EVERYTHING, ["list", "watch", "export"]),
    ((Change.USERS,), ["list", "watch"]),
    ((Change.POSTS,), ["watch", "export"]),
)
OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


class Wrong(AssertionError):
    """A mirror differs from the tables, or was late."""


def draw_history(random: Random) -> dict[str, Any]:
    """Return a random history."""
    return {
        "seed": random.getrandbits(32),
        "operations": OPERATIONS,
        "bulk_loads": random.randint(0, 2),
        "old_writes_early": random.random() < 0.3,
        "old_rolls_back": random.random() < 0.2,
        "prunes": random.random() < 0.6,
        "faults": [],
    }


def draw_history_with_faults(random: Random) -> dict[str, Any]:
    """Return a random history in which servers, PostgreSQL and a consumer are killed."""
    kinds = ["kill a server", "crash PostgreSQL", "kill the watcher", "kill the watcher"]
    random.shuffle(kinds)
    faults = [[round(random.uniform(0.1, 1), 3), kind] for kind in kinds]
    return draw_history(random) | {"prunes": False, "faults": faults}


async def replay(history: dict[str, Any], url: str) -> None:
    """Run a history on a migrated database; raises Wrong if a mirror is wrong."""
    async with serve(url, caller_streams=1000) as first, serve(url, caller_streams=1000) as second:
        trial = Trial(history, url)
        if history["prunes"]:
            trial.chores.append(lambda: _prune_forever(first.database))
        await trial.run([first.address, second.address])


async def replay_with_faults(
    history: dict[str, Any], url: str, postgres: PostgresServer, folder: Path
) -> None:
    """Run a history against processes that are killed, on a PostgreSQL that crashes; raises Wrong."""
    trial = Trial(history, url)
    servers = [MortalServer(url, folder / f"log{number}") for number in range(2)]
    addresses = [server.address for server in servers]
    watcher = Watcher(folder / "mirror.db", addresses)
    trial.others.append(watcher.stored)

    async def crash() -> None:
        await asyncio.to_thread(postgres.stop, "immediate")
        await asyncio.to_thread(postgres.start)
        await trial.begin_old_again()

    faults = {
        "kill a server": lambda: trial.random.choice(servers).kill(),
        "crash PostgreSQL": crash,
        "kill the watcher": watcher.kill,
    }

    async def inject_all() -> None:
        for pause, kind in history["faults"]:
            await asyncio.sleep(pause)
            await faults[kind]()

    trial.injections.append(inject_all)
    async with AsyncExitStack() as stack:
        for server in servers:
            await stack.enter_async_context(server.running())
        await stack.enter_async_context(watcher.running())
        await trial.run(addresses)


async def _prune_forever(database: Any) -> None:
    while True:
        await prune_changes(database, utc_now() - timedelta(seconds=KEPT_SECONDS))
        await asyncio.sleep(PRUNE_SECONDS)


class Trial:
    """Runs a history against servers of one database."""

    def __init__(self, history: dict[str, Any], url: str) -> None:
        self.history = history
        self.url = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        self.random = Random(history["seed"])
        self.plan = Plan(self.random, history["operations"], history["bulk_loads"])
        self.probes: list[tuple[float, int, int]] = []  # when each was committed, and the ids of its rows
        self.faults = bool(history.get("faults"))
        self.chores: list[Callable[[], Awaitable[None]]] = [self._probe_forever]
        self.followers: list[Follower] = []
        self.others: list[StoredMirror] = []
        self.injections: list[Callable[[], Awaitable[None]]] = []  # of faults, while writers write
        self.longest_lag = 0.0
        self._is_quiet = False  # nothing is written

    async def run(self, addresses: Sequence[str]) -> None:
        """Run the history; raises Wrong."""
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(grpc.aio.insecure_channel(address, options=OPTIONS))
                for address in addresses
            ]
            for channel in channels:
                await channel.channel_ready()
            servers = [Stubs(channel) for channel in channels]
            self.followers = [
                Follower(servers, self._other_random(), entities, kinds) for entities, kinds in FOLLOWERS
            ]
            await self._with_chores(lambda: self._check_all(servers))

    async def _with_chores(self, body: Callable[[], Awaitable[None]]) -> None:
        """Run the body while the followers and the other chores run; raises the first error of any."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(follower.run()) for follower in self.followers]
                tasks += [group.create_task(_await(chore)) for chore in self.chores]
                await body()
                for task in tasks:
                    task.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _check_all(self, servers: Sequence[Stubs]) -> None:
        await self._begin_old()
        await asyncio.gather(self._write(servers), *(inject() for inject in self.injections))
        await asyncio.sleep(self._opened_at + OPEN_SECONDS - time.monotonic())
        await self._write_late(self._late)
        await self._older.commit()
        await self._write_late(self._early)
        await self._check_liveness(servers)
        self._is_quiet = True
        await self._check_equality("while an old transaction is open")
        await (self._old.rollback() if self.history["old_rolls_back"] else self._old.commit())
        await self._check_equality("when all transactions have ended")
        self._check_lags()
        await self._early.close()
        await self._late.close()

    async def _begin_old(self) -> None:
        """Begin two transactions: one has its xid now, and the other one will get it late."""
        self._early, self._late = [await asyncpg.connect(self.url, server_settings=LIMITS) for _ in range(2)]
        self._old, self._older = self._early.transaction(), self._late.transaction()
        await self._old.start()
        await self._early.execute("SELECT pg_current_xact_id()")
        if self.history["old_writes_early"]:
            email = f"old{self.random.getrandbits(32)}@example.org"
            await self._early.execute("INSERT INTO users (email) VALUES ($1)", email)
        await self._older.start()
        await self._late.execute("SELECT now()")  # which is its time from here on
        self._opened_at = time.monotonic()

    async def begin_old_again(self) -> None:
        """Begin the old transactions again, after a crash."""
        self._early.terminate()
        self._late.terminate()
        await self._begin_old()

    async def _write(self, servers: Sequence[Stubs]) -> None:
        faults, locks = self.faults, not self.history["old_writes_early"]
        writers: list[SqlWriter | CallWriter] = [
            SqlWriter(self.url, self.plan, self._other_random(), faults=faults) for _ in range(SQL_WRITERS)
        ]
        writers += [
            CallWriter(servers, self.plan, self._other_random(), faults=faults, locks=locks)
            for _ in range(CALL_WRITERS)
        ]
        await asyncio.gather(*(writer.run() for writer in writers))

    async def _write_late(self, connection: Any) -> None:
        """Write in an old transaction, also rows that later transactions have written."""
        await SqlWriter(self.url, self.plan, self._other_random()).write_in_transaction(connection)

    async def _probe_forever(self) -> None:
        """Write rows that nobody else touches."""
        while True:
            if not self._is_quiet:
                with suppress(*(BROKEN if self.faults else ())):
                    await self._probe()
            await asyncio.sleep(PROBE_SECONDS)

    async def _probe(self) -> tuple[float, int]:
        """Write a user and a post; return when it was committed, and the id of the user."""
        email = f"{PROBE}{self.random.getrandbits(64)}@example.org"
        async with self._connected() as connection, connection.transaction():
            user = await connection.fetchval("INSERT INTO users (email) VALUES ($1) RETURNING id", email)
            statement = "INSERT INTO posts (title, content, author_id) VALUES ($1, '', $2) RETURNING id"
            post = await connection.fetchval(statement, PROBE, user)
        self.probes.append((time.monotonic(), user, post))
        return self.probes[-1][:2]

    async def _check_liveness(self, servers: Sequence[Stubs]) -> None:
        """Raise Wrong if a consumer that is up to date hears late of a change, three times in a row."""
        delays = []
        for _ in range(3):
            delays.append(await self._delay(self.random.choice(servers)))
            if delays[-1] < LIVE_SECONDS:
                return
        raise Wrong(f"with an old transaction open, changes arrive after {delays} s")

    async def _delay(self, stubs: Stubs) -> float:
        """Return after how many seconds a watch and a poll have a change, at most 3 times the limit."""
        token = (await stubs.changes.ListChanges(ListChangesRequest())).token
        call = stubs.changes.WatchChanges(WatchChangesRequest())
        await call.read()
        committed, user = await self._probe()

        async def watch() -> None:
            response: Any = await call.read()
            while all(change.user.id != user for change in response.changes):
                response = await call.read()

        async def poll() -> None:
            request = ListChangesRequest(token=token, page_size=1000)
            while True:
                response = await stubs.changes.ListChanges(request)
                if any(change.user.id == user for change in response.changes):
                    return
                request.token = response.token

        try:
            async with asyncio.timeout(3 * LIVE_SECONDS):
                await asyncio.gather(watch(), poll())
        except TimeoutError:
            pass
        except grpc.aio.AioRpcError as error:
            raise Wrong(f"a new token is refused: {error.details()}") from None
        finally:
            call.cancel()
        return time.monotonic() - committed

    async def _check_equality(self, when: str) -> None:
        """Raise Wrong if a mirror does not become equal to the tables."""
        followers: list[Follower | StoredMirror] = [*self.followers, *self.others]
        for follower in followers:
            difference, changed_at = "", time.monotonic()
            while found := follower.mirror.difference(await self._stored()):
                if found != difference:
                    difference, changed_at = found, time.monotonic()
                if time.monotonic() - changed_at > STUCK_SECONDS:
                    raise Wrong(f"{when}, the mirror of {follower.name} differs: {difference}")
                await asyncio.sleep(0.1)

    async def _stored(self) -> Rows:
        rows: Rows = {}
        async with self._connected() as connection, connection.transaction(isolation="repeatable_read"):
            for table in TABLES.values():
                for id, *values in await connection.fetch(select_rows(table)):
                    rows[table, id] = tuple(values)
        return rows

    def _check_lags(self) -> None:
        """Raise Wrong if a read that said that nothing follows lacked a row that was committed before it."""
        for follower in self.followers:
            for committed, user, post in self.probes:
                for key in (("users", user), ("posts", post)):
                    if key[0] in follower.mirror.tables:
                        self._check_lag(follower, committed, key)

    def _check_lag(self, follower: Follower, committed: float, key: RowKey) -> None:
        arrival = follower.mirror.arrivals[key]
        late = [end for begin, end in follower.complete_reads if committed < begin and end < arrival]
        self.longest_lag = max(self.longest_lag, arrival - committed)
        if late or arrival - committed > LAG_SECONDS:
            delay = arrival - committed
            raise Wrong(f"{follower.name} got {key} after {delay:.1f} s, and lacked it in {len(late)} reads")

    def _other_random(self) -> Random:
        return Random(self.random.getrandbits(64))

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        connection = await asyncpg.connect(self.url)
        try:
            yield connection
        finally:
            await connection.close(timeout=5)


async def _await(chore: Callable[[], Awaitable[None]]) -> None:
    await chore()
