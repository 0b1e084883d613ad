"""Measure what users and posts take: bytes of tables, indexes, WAL and backups, and seconds of maintenance.

    python -m bench.sizes --users 1000000 --posts 2000000

The rows repeat the names, titles and contents of `tests/data/stackexchange` in random order, so their lengths
are real. The script starts a PostgreSQL of its own, without fsync: times are those of processors and the page
cache, not of a disk. Autovacuum is off, so that nothing else runs.
"""

import argparse
import asyncio
import gzip
import json
import subprocess
from collections.abc import Awaitable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import asyncpg
from sqlalchemy import bindparam, select
from sqlalchemy.dialects.postgresql.asyncpg import dialect

from bench.databases import SETTINGS, plain_url
from service.db import migrations
from service.db.base import BigInt
from service.db.bulk.batch import Outcome, Result
from service.db.compiled import CompiledSelect
from service.db.dialect import is_one_of_keys
from service.db.engine import Database
from service.db.selection import readable_columns, select_page
from service.loads.repository import LoadRepository
from service.posts.model import Post
from service.posts.repository import BASIC, PostRepository
from service.settings import Settings
from service.users.model import User
from tests.support.postgres import PostgresServer, find_programs

SAMPLES = Path(__file__).parents[1] / "tests/data/stackexchange"
PROGRAMS = find_programs("pg_dump", "pg_restore", "pg_basebackup")
MILLION = 1_000_000
SMALL = 20_000  # rows, for comparing lookups with those in large tables
LAST_PART = 10  # the last tenth is loaded after a checkpoint: its WAL contains full pages, as usual
BATCH_ROWS = (5000, 500, 50)
BATCHES = 200

# The order of the samples is random, but the same in each run.
RANDOM = "(hashint8({seed}) & 2147483647)"
HASH = r"""
    '$argon2id$v=19$m=19456,t=2,p=1$' || left(encode(sha256(('salt' || n)::bytea), 'base64'), 22)
    || '$' || left(encode(sha256(('hash' || n)::bytea), 'base64'), 43)
"""
SPAN = "SELECT n FROM generate_series({first}::bigint, {last}) AS n"
USERS = f"""
    SELECT lower(regexp_replace(full_name, '[^A-Za-z]+', '.', 'g')) || n || '@example.org', {HASH}, full_name
    FROM ({SPAN}) AS numbers JOIN sample_users ON number = {RANDOM.format(seed="n")} % {{samples}}
"""
POSTS = f"""
    SELECT title, content, 1 + {RANDOM.format(seed="n + 1000000000")} % {{users}}
    FROM ({SPAN}) AS numbers JOIN sample_posts ON number = {RANDOM.format(seed="n")} % {{samples}}
"""
COLUMNS = {"users": "email, hashed_password, full_name", "posts": "title, content, author_id"}
ROWS = {"users": USERS, "posts": POSTS}
UPDATES = {"users": "full_name = reverse(full_name)", "posts": "content = reverse(content)"}
RELATIONS = """
    SELECT relname, relkind = 'r' AS is_table, pg_relation_size(oid) AS bytes,
        pg_total_relation_size(nullif(reltoastrelid, 0)) AS toast
    FROM pg_class
    WHERE oid = $1::text::regclass
        OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = $1::text::regclass)
    ORDER BY relkind DESC, relname
"""


class Measuring:
    """A database, and the figures printed so far."""

    def __init__(self, url: str, connection: Any, folder: Path) -> None:
        self.url = url
        self.connection = connection
        self.folder = folder

    async def value(self, query: str, *arguments: Any) -> Any:
        return await self.connection.fetchval(query, *arguments, timeout=3600)

    async def run(self, statement: str) -> float:
        """Return the seconds that a statement takes."""
        began = perf_counter()
        await self.connection.execute(statement, timeout=3600)
        return perf_counter() - began

    async def wal(self, work: Awaitable[float]) -> tuple[float, int]:
        """Return the seconds that a statement takes, and the bytes of WAL that it writes."""
        start = await self.value("SELECT pg_current_wal_insert_lsn()")
        seconds = await work
        return seconds, int(await self.value("SELECT pg_current_wal_insert_lsn() - $1::pg_lsn", start))


def report(subject: str, *figures: str) -> None:
    """Print a row of the table."""
    print(f"| {subject} | {', '.join(figures)} |", flush=True)


def per_row(size: float, rows: int) -> str:
    return f"{size / rows:,.1f} B a row"


def per_million(seconds: float, rows: int) -> str:
    return f"{seconds / rows * MILLION:,.1f} s a million rows"


async def add_samples(measuring: Measuring) -> None:
    """Create the tables of real names, titles and contents."""
    users = [(user.get("full_name"),) for user in samples("users")]
    posts = [(post["title"][:255], post["content"]) for post in samples("posts")]
    await measuring.run("CREATE TABLE sample_users (number bigserial, full_name text)")
    await measuring.run("CREATE TABLE sample_posts (number bigserial, title text, content text)")
    for kind, columns, rows in (("users", ["full_name"], users), ("posts", ["title", "content"], posts)):
        await measuring.connection.copy_records_to_table(f"sample_{kind}", records=rows, columns=columns)
        await measuring.run(f"UPDATE sample_{kind} SET number = number - 1")
        await measuring.run(f"ANALYZE sample_{kind}")


def samples(kind: str) -> Iterator[Any]:
    for path in SAMPLES.glob(f"*/{kind}.ndjson.gz"):
        with gzip.open(path, "rt") as lines:
            yield from map(json.loads, lines)


async def load(measuring: Measuring, kind: str, rows: int, users: int) -> None:
    """Load a table by COPY from files, in the order of their ids, and report what each row took."""
    number = await measuring.value(f"SELECT count(*) FROM sample_{kind}")
    split = rows - rows // LAST_PART
    for first, last, name in ((1, split, ""), (split + 1, rows, " after a checkpoint")):
        file = measuring.folder / f"{kind}.copy"
        query = ROWS[kind].format(first=first, last=last, users=users, samples=number)
        await measuring.run(f"COPY ({query}) TO '{file}'")
        await measuring.run("CHECKPOINT")
        seconds, wal = await measuring.wal(measuring.run(f"COPY {kind} ({COLUMNS[kind]}) FROM '{file}'"))
        report(
            f"{kind}: COPY{name}",
            f"{seconds / (last - first + 1) * MILLION:.1f} µs a row",
            f"WAL {per_row(wal, last - first + 1)}",
            f"text {per_row(file.stat().st_size, last - first + 1)}",
        )
        file.unlink()


async def report_sizes(measuring: Measuring, kind: str, rows: int, when: str) -> None:
    """Report the bytes of a table, its TOAST and its indexes."""
    figures, total = [], 0
    for relation in await measuring.connection.fetch(RELATIONS, kind):
        toast = relation["toast"] or 0
        total += relation["bytes"] + toast
        figures.append(f"{relation['relname']} {relation['bytes'] / rows:,.1f}")
        if relation["is_table"]:
            figures.append(f"TOAST {toast / rows:,.1f}")
    report(f"{kind}: {when}", *figures, f"together {per_row(total, rows)}")


async def update_a_fifth(measuring: Measuring, kind: str, rows: int) -> None:
    """Update 20 % of the rows twice, with a vacuum in between, and report the sizes."""
    for number in (1, 2):
        seconds, wal = await measuring.wal(
            measuring.run(
                f"UPDATE {kind} SET {UPDATES[kind]}, version = version + 1, updated_at = now() "
                f"WHERE id % 5 = {number}"
            )
        )
        updated = rows // 5
        report(
            f"{kind}: UPDATE of 20 %, round {number}",
            f"{seconds / updated * MILLION:.1f} µs a row",
            f"WAL {per_row(wal, updated)}",
        )
        await report_sizes(measuring, kind, rows, f"sizes after round {number}")
        await vacuum(measuring, kind, rows, f"VACUUM after round {number}")


async def vacuum(measuring: Measuring, kind: str, rows: int, name: str, options: str = "") -> None:
    seconds, wal = await measuring.wal(measuring.run(f"VACUUM {options} {kind}"))
    report(f"{kind}: {name}", per_million(seconds, rows), f"WAL {per_row(wal, rows)}")


async def build_index(measuring: Measuring, kind: str, columns: str, rows: int) -> None:
    seconds = await measuring.run(f"CREATE INDEX CONCURRENTLY measured ON {kind} ({columns})")
    size = await measuring.value("SELECT pg_relation_size('measured')")
    report(
        f"CREATE INDEX CONCURRENTLY on {kind} ({columns})", per_million(seconds, rows), per_row(size, rows)
    )
    await measuring.run("DROP INDEX measured")


async def back_up(measuring: Measuring, server: PostgresServer, rows: int) -> None:
    """Dump, restore and copy the database."""
    await measuring.run("DROP TABLE sample_users, sample_posts")
    dump, base = measuring.folder / "roster.dump", measuring.folder / "base"
    size = await measuring.value("SELECT pg_database_size(current_database())")
    report("the database", f"{size / 1e9:.2f} GB")
    seconds = timed("pg_dump", "--format=custom", f"--file={dump}", plain_url(measuring.url))
    report("pg_dump -Fc", f"{seconds:.0f} s", f"{dump.stat().st_size / 1e9:.2f} GB", mb_s(size, seconds))
    async with server.database() as other:
        seconds = timed("pg_restore", "--jobs=2", f"--dbname={plain_url(other)}", str(dump))
        report("pg_restore -j2", f"{seconds:.0f} s", per_million(seconds, rows), mb_s(size, seconds))
    dump.unlink()
    await measuring.run("CHECKPOINT")
    seconds = timed(
        "pg_basebackup", f"--pgdata={base}", "--checkpoint=fast", f"--dbname={plain_url(measuring.url)}"
    )
    copied = sum(file.stat().st_size for file in base.rglob("*") if file.is_file())
    report("pg_basebackup", f"{seconds:.0f} s", f"{copied / 1e9:.2f} GB", mb_s(copied, seconds))


def timed(program: str, *arguments: str) -> float:
    began = perf_counter()
    subprocess.run([PROGRAMS / program, *arguments], check=True, capture_output=True)
    return perf_counter() - began


def mb_s(size: float, seconds: float) -> str:
    return f"{size / seconds / 1e6:.0f} MB/s of tables"


def lookups(rows: int) -> Iterator[tuple[str, CompiledSelect, dict[str, Any]]]:
    """Yield statements of calls, as the service compiles them, for tables with this many rows."""
    known, columns = dialect(), readable_columns(User)
    by_id = select(*columns).where(is_one_of_keys(User.id, known))
    yield "GetUser", CompiledSelect(by_id, known), {"keys": [rows // 2]}
    by_email = select(*columns).where(is_one_of_keys(User.email, known))
    yield "GetUserByEmail", CompiledSelect(by_email, known), {"keys": ["nobody@example.org"]}
    after = bindparam("after", type_=BigInt)
    page = select_page(BASIC, keyset=PostRepository.by_id(), after=[after], limit=50)
    yield "ListPosts, 50 from the middle", CompiledSelect(page, known), {"after": rows // 2}
    of_author = select_page(
        BASIC, Post.author_id == after, keyset=PostRepository.by_id(), after=None, limit=50
    )
    yield "ListPosts of an author", CompiledSelect(of_author, known), {"after": rows // 4}


async def report_lookups(measuring: Measuring, rows: int) -> None:
    """Report the pages that lookups touch, and their time, once all pages are cached."""
    for name, query, values in lookups(rows):
        bound = [
            convert(values.get(parameter.key, parameter.value))
            for parameter, convert in zip(query._parameters, query._converters, strict=True)  # noqa: SLF001
        ]
        for _ in range(2):
            explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query.sql}"
            [plan] = json.loads(await measuring.value(explain, *bound))
        hits = plan["Plan"]["Shared Hit Blocks"] + plan["Plan"]["Shared Read Blocks"]
        report(f"{name}, of {rows:,} rows", f"{hits} pages", f"{plan['Execution Time']:.2f} ms")


async def report_outcomes(measuring: Measuring) -> None:
    """Report what the stored outcomes of a load take, for batches of several sizes."""
    database = Database(Settings(database_url=plain_url(measuring.url)))
    for size in BATCH_ROWS:
        async with database.begin() as session:
            loads = LoadRepository(session, "measured")
            load = await loads.open(f"batches of {size}", "create", b"")
            for batch in range(BATCHES):
                ids = range(batch * size * 3 + 1, batch * size * 3 + size + 1)
                outcome = Outcome(bytes([Result.CREATED]) * size, [*ids])
                await loads.record(load, batch * size, outcome)
        await measuring.run("VACUUM FULL bulk_batches")
        stored = await measuring.value("SELECT pg_total_relation_size('bulk_batches')")
        report(f"outcomes of a load in batches of {size}", per_row(stored, BATCHES * size))
        await measuring.run("TRUNCATE bulk_batches")
    await database.close()


async def report_migration(measuring: Measuring) -> None:
    """Report the seconds of `roster migrate`: of one with nothing to do, and of the last migrations."""
    for name, revision in (("nothing to do", "head"), ("back to 0003", "0003"), ("from 0003", "head")):
        migrate = migrations.downgrade if revision == "0003" else migrations.upgrade
        began = perf_counter()
        await asyncio.to_thread(migrate, measuring.url, revision)
        report(f"roster migrate, {name}", f"{perf_counter() - began:.1f} s")


async def measure(users: int, posts: int) -> None:
    """Measure everything, and print it."""
    with TemporaryDirectory(prefix="roster-sizes-", dir="/tmp") as folder, PostgresServer() as server:
        Path(folder).chmod(0o777)  # noqa: ASYNC240  (nothing else runs; the server writes there as another user)
        connection = await asyncpg.connect(plain_url(server.url.render_as_string()))
        for name, value in {**SETTINGS, "max_wal_size": "32GB"}.items():
            await connection.execute(f"ALTER SYSTEM SET {name} = '{value}'")
        await connection.close()
        server.stop()
        server.start()
        async with server.database() as url:
            await asyncio.to_thread(migrations.upgrade, url)
            connection = await asyncpg.connect(plain_url(url), statement_cache_size=0)
            measuring = Measuring(url, connection, Path(folder))
            await measure_all(measuring, server, {"users": users, "posts": posts})
            await connection.close()


async def measure_all(measuring: Measuring, server: PostgresServer, rows: Mapping[str, int]) -> None:
    await add_samples(measuring)
    await report_outcomes(measuring)
    for kind in rows:
        await load(measuring, kind, SMALL, SMALL)
        await vacuum(measuring, kind, SMALL, "first VACUUM of few", "(ANALYZE)")
    await report_lookups(measuring, SMALL)
    await measuring.run("TRUNCATE users, posts RESTART IDENTITY")
    for kind, number in rows.items():
        await load(measuring, kind, number, rows["users"])
        await report_sizes(measuring, kind, number, "sizes as loaded")
        await vacuum(measuring, kind, number, "first VACUUM", "(ANALYZE)")
        await vacuum(measuring, kind, number, "VACUUM FREEZE", "(FREEZE)")
    await report_lookups(measuring, rows["users"])
    for kind, number in rows.items():
        count = await measuring.run(f"SELECT count(*) FROM {kind}")
        report(f"{kind}: count(*)", per_million(count, number))
    await build_index(measuring, "users", "full_name", rows["users"])
    await build_index(measuring, "posts", "author_id, created_at", rows["posts"])
    await report_migration(measuring)
    await back_up(measuring, server, sum(rows.values()))
    for kind, number in rows.items():
        await update_a_fifth(measuring, kind, number)


def main() -> None:
    """Read the options, and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=MILLION)
    parser.add_argument("--posts", type=int, default=2 * MILLION)
    options = parser.parse_args()
    asyncio.run(measure(options.users, options.posts))


if __name__ == "__main__":
    main()
