"""How lists are read: by an index, no more rows than the page has, at any depth of 500,000 rows."""

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest
from sqlalchemy import Engine, event
from sqlalchemy.ext.asyncio import AsyncConnection

from roster.v1.posts_pb2 import ListPostsRequest
from roster.v1.users_pb2 import ListUsersRequest
from service.db.engine import Database
from service.db.paging import ListQuery
from service.db.repository import Repository
from service.db.selection import Selection
from service.errors import StatementTimeout
from service.posts.model import Post
from service.posts.repository import WITH_AUTHOR, PostRepository
from service.settings import Settings
from service.users.repository import WITH_POSTS, UserRepository
from tests.postgres import Postgres

# Filling it takes 5 seconds; with other work on the machine, minutes.
pytestmark = pytest.mark.timeout(600)
FILL_TIMEOUT = 300

ROWS = 500_000
PAGE = 1000
# Times and authors are scattered over the ids, and e-mails over everything: no index has the table's order.
FILL = [
    f"""
    INSERT INTO users (email, full_name, is_active, created_at)
    SELECT md5(n::text) || '@example.org', 'Name ' || n, n % 100 > 0,
           timestamptz '2024-01-01Z' + n * 7919 % {ROWS} * interval '1 minute'
    FROM generate_series(1, {ROWS}::bigint) n
    """,
    f"""
    INSERT INTO posts (title, content, author_id, created_at)
    SELECT md5(n::text), '', n * 7919 % 10000 + 1,
           timestamptz '2024-01-01Z' + n * 7919 % {ROWS} * interval '1 minute'
    FROM generate_series(1, {ROWS}::bigint) n
    """,
]
DEEP: dict[str, list[Any]] = {
    "id": [400_000],
    "email": ["cccc"],
    "created_at": [datetime(2024, 10, 1, tzinfo=UTC), 7],
}
INDEX = {
    "users": {"id": "pk_users", "email": "uq_users_email", "created_at": "ix_users_created_at_id"},
    "posts": {"id": "pk_posts", "created_at": "ix_posts_created_at_id"},
}
DAY = 'created_at >= "2024-03-01T00:00:00Z" AND created_at < "2024-03-02T00:00:00Z"'
# Those by indexed fields, and as many rows as match at most.
NARROW = {
    "users": {
        "id = 7": 1,
        "id > 1000 AND id <= 2000": 1000,
        'email = "nobody@example.org"': 1,
        'email >= "abc" AND email < "abd"': 200,
        'created_at = "2024-03-01T00:00:00Z"': 1,
        DAY: 1440,
        f'{DAY} AND is_active = false AND email : "a"': 1440,
    },
    "posts": {
        "id = 7": 1,
        "id > 1000 AND id <= 2000": 1000,
        "author_id = 77": 50,
        "author_id = 77 OR author_id = 78": 100,
        "author_id > 77 AND author_id < 90": 600,
        'created_at = "2024-03-01T00:00:00Z"': 1,
        DAY: 1440,
        f"{DAY} AND author_id = 77": 50,
        f'{DAY} AND title : "a"': 1440,
    },
}
CONTAINS = {"users": 'email : "a" AND is_active = true', "posts": 'title : "a"'}


@dataclass(frozen=True)
class Lister:
    """One of the List RPCs with one of its views."""

    repository: type[Repository[Any, Any]]
    request: Callable[..., Any]
    selection: Selection

    @property
    def table(self) -> str:
        return str(self.repository.model.__tablename__)

    async def queries(self, text: str = "") -> AsyncIterator[tuple[str, ListQuery]]:
        """Each order in each direction, with the first page and one deep in the table."""
        for order, direction in product(self.repository.sortable, ("asc", "desc")):
            request = self.request(filter=text, order_by=f"{order} {direction}", page_size=PAGE)
            query = await self.repository.list_query(request)
            yield order, query
            yield order, replace(query, after=DEEP[order])


LISTERS = [
    Lister(UserRepository, ListUsersRequest, UserRepository.basic()),
    Lister(UserRepository, ListUsersRequest, WITH_POSTS),
    Lister(PostRepository, ListPostsRequest, PostRepository.basic()),
    Lister(PostRepository, ListPostsRequest, WITH_AUTHOR),
]
each_lister = pytest.mark.parametrize("lister", LISTERS, ids=["users", "WITH_POSTS", "posts", "WITH_AUTHOR"])


@pytest.fixture(scope="module")
async def large(postgres: Postgres, postgresql_template: str) -> AsyncIterator[Database]:
    """A database with so many users and posts."""
    async with postgres.database(postgresql_template) as url:
        database = Database(Settings(database_url=url, statement_timeout=FILL_TIMEOUT))
        async with database.begin() as session:
            await fill(await session.connection())
        yield database
        await database.close()


async def fill(connection: AsyncConnection) -> None:
    """Write the rows, and build the indexes of the migrations after them: 3 seconds instead of 20."""
    indexes = await connection.exec_driver_sql(
        "SELECT indexdef FROM pg_indexes WHERE indexname ~ '^(uq|ix)_(users|posts)_' ORDER BY indexname"
    )
    definitions = list(indexes.scalars())
    await connection.exec_driver_sql("ALTER TABLE posts DROP CONSTRAINT fk_posts_author_id_users")
    await connection.exec_driver_sql("ALTER TABLE users DROP CONSTRAINT uq_users_email")
    for definition in definitions:
        if "uq_users_email" not in definition:
            await connection.exec_driver_sql(f"DROP INDEX {definition.split()[2]}")
    for statement in [*FILL, *definitions, "ANALYZE users, posts"]:
        await connection.exec_driver_sql(statement)


class Sent(Exception):
    """What was about to be executed."""


def stop(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
    raise Sent(statement, parameters)


async def explained(database: Database, explain: str, query: ListQuery, lister: Lister) -> list[Any]:
    """Return what the database says of the statement that reads the page."""
    async with database.read() as session:
        connection = await session.connection()
        event.listen(Engine, "before_cursor_execute", stop)
        with pytest.raises(Sent) as sent:
            await lister.repository(session).page(query, lister.selection)
        event.remove(Engine, "before_cursor_execute", stop)
        statement, parameters = sent.value.args
        return list(await connection.exec_driver_sql(f"{explain} {statement}", parameters))


async def nodes(database: Database, query: ListQuery, lister: Lister) -> list[dict[str, Any]]:
    """Return the nodes of PostgreSQL's plan, run for real."""
    explain = "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON)"
    [([plan],)] = await explained(database, explain, query, lister)
    return list(flat(plan["Plan"]))


def flat(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for inner in node.get("Plans", []):
        yield from flat(inner)


def scans(plan: list[dict[str, Any]], table: str) -> list[dict[str, Any]]:
    return [node for node in plan if node.get("Relation Name") == table]


def read(node: dict[str, Any]) -> int:
    """Return how many rows a node looked at."""
    return int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])


@each_lister
async def test_a_page_reads_its_own_rows_at_any_depth(large: Database, lister: Lister) -> None:
    """Through the index of its order, so that nothing is left to sort but the page."""
    async for order, query in lister.queries():
        plan = await nodes(large, query, lister)
        rows = scans(plan, lister.table)
        assert "Seq Scan" not in {node["Node Type"] for node in plan}
        assert INDEX[lister.table][order] in {node.get("Index Name") for node in rows}
        assert max(map(read, rows)) <= PAGE + 1


@each_lister
async def test_a_filter_by_an_indexed_field_reads_what_it_finds(large: Database, lister: Lister) -> None:
    """In every order, for equality and for ranges: never the table."""
    for text, matches in NARROW[lister.table].items():
        async for _, query in lister.queries(text):
            plan = await nodes(large, query, lister)
            assert "Seq Scan" not in {node["Node Type"] for node in plan}
            assert max(map(read, scans(plan, lister.table))) <= matches


@each_lister
async def test_a_filter_by_no_index_walks_the_order_until_the_page_is_full(
    large: Database, lister: Lister
) -> None:
    """Such as `:`; it neither sorts the table nor reads on behind the page."""
    async for order, query in lister.queries(CONTAINS[lister.table]):
        plan = await nodes(large, query, lister)
        assert {node["Node Type"] for node in scans(plan, lister.table)} == {"Index Scan"}
        assert INDEX[lister.table][order] in {node["Index Name"] for node in scans(plan, lister.table)}
        assert max(map(read, scans(plan, lister.table))) <= 2 * PAGE


async def test_a_walk_that_fills_no_page_ends_with_the_statement_timeout(large: Database) -> None:
    """A filter that nothing matches costs no more than that."""
    url = large.engine.url.render_as_string(hide_password=False)
    impatient = Database(Settings(database_url=url, statement_timeout=0.1))
    query = await UserRepository.list_query(ListUsersRequest(filter='email : "nobody"', order_by="email"))
    with pytest.raises(StatementTimeout):
        async with impatient.read() as session:
            await UserRepository(session).page(query)
    await impatient.close()


async def test_the_posts_of_one_author_are_read_alone(large: Database) -> None:
    """In every order, and with a filter that no index helps."""
    lister = LISTERS[2]
    for text in ("", CONTAINS["posts"]):
        async for _, query in lister.queries(text):
            query = replace(query, conditions=[Post.author_id == 77, *query.conditions])  # noqa: PLW2901
            plan = await nodes(large, query, lister)
            assert max(map(read, scans(plan, "posts"))) <= ROWS // 10_000


@pytest.fixture
async def embedded(sqlite_url: str) -> AsyncIterator[Database]:
    """An empty database on SQLite, which plans without a look at the rows."""
    database = Database(Settings(database_url=sqlite_url))
    yield database
    await database.close()


async def found(database: Database, query: ListQuery, lister: Lister) -> str:
    """Return how SQLite finds the rows of the page."""
    lines = await explained(database, "EXPLAIN QUERY PLAN", query, lister)
    ways = (f"SCAN {lister.table}", f"SEARCH {lister.table}")
    return next(str(line.detail) for line in lines if line.detail.startswith(ways))


@each_lister
async def test_sqlite_walks_the_index_of_the_order(embedded: Database, lister: Lister) -> None:
    """With a filter that no index helps, and without; from the key of a deep page on."""
    for text in ("", CONTAINS[lister.table]):
        async for order, query in lister.queries(text):
            # The table itself is in the order of the ids; a key's index has a name of SQLite's own.
            deep = " USING INTEGER PRIMARY KEY" if query.after else ""
            index = INDEX[lister.table][order].replace("uq_users_email", "sqlite_autoindex_users_1")
            way = deep if order == "id" else f" USING INDEX {index}"
            walk = "SEARCH" if query.after else "SCAN"
            assert (await found(embedded, query, lister)).startswith(f"{walk} {lister.table}{way}")


@each_lister
async def test_sqlite_searches_an_index_for_an_indexed_field(embedded: Database, lister: Lister) -> None:
    """In every order, for equality and for ranges."""
    for text in NARROW[lister.table]:
        async for _, query in lister.queries(text):
            assert (await found(embedded, query, lister)).startswith(f"SEARCH {lister.table} USING")
