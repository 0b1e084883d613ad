"""The plans of the statements that read RPCs send, on tables of 500,000 rows.

Each test calls an RPC of a running server, records the statements that reach the driver, and explains them:
they must use an index and read no more rows than the answer has, at any depth of the table.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from hashlib import md5
from itertools import product
from typing import Any

import grpc
import pytest
from sqlalchemy.ext.asyncio import AsyncConnection

from roster.v1.posts_pb2 import (
    BatchGetPostsRequest,
    CountPostsRequest,
    ExportPostsRequest,
    GetPostRequest,
    ListPostsRequest,
)
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    CountUsersRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    VerifyPasswordRequest,
)
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db.engine import Database
from service.db.paging import encode_token, fingerprint
from service.settings import Settings
from tests.support.errors import refusal
from tests.support.postgres import Postgres
from tests.support.server import serve
from tests.support.statements import Statement, record_statements

# Filling the tables takes 5 seconds, on a busy machine minutes.
pytestmark = pytest.mark.timeout(600)
FILL_TIMEOUT = 300

ROWS = 500_000
PAGE = 1000
# Times, authors and e-mails are scattered over the ids, so that no other index has the order of the table.
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
# Filters by indexed fields, with the greatest number of rows that match.
NARROW = {
    "users": {
        "id = 7": 1,
        "id > 1000 AND id <= 2000": 1000,
        'email = "nobody@example.org"': 1,
        'email >= "abc" AND email < "abd"': 200,
        'email = "abc*"': 200,
        'email = "ABC*" AND full_name:*': 200,
        f"{DAY} AND -full_name:*": 1440,
        'email = "Abc*" OR email = "abd*"': 400,
        'created_at = "2024-03-01T00:00:00.000000001Z"': 1,
        'created_at > "2024-02-29T23:59:59.999999999Z" AND created_at <= "2024-03-01T00:00:00.0000001Z"': 1,
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
        f'{DAY} AND title = "a*"': 1440,
        'author_id = 77 AND title = "a*"': 50,
    },
}
# Filters that no index supports, matched by about every second row.
CONTAINS = {"users": 'email : "a" AND is_active = true', "posts": 'title : "a"'}
EMAIL = md5(b"7", usedforsecurity=False).hexdigest() + "@example.org"
IDS = range(1000, 1100)
READS_ROWS = re.compile(r"SELECT .*\bFROM .*\b(users|posts)\b", re.DOTALL)
EXPLAIN = {"postgresql": "EXPLAIN (ANALYZE, TIMING OFF, FORMAT JSON)", "sqlite": "EXPLAIN QUERY PLAN"}

Node = dict[str, Any]


@dataclass(frozen=True)
class ListRpc:
    """A List RPC and the view to ask for."""

    name: str
    table: str
    request: Callable[..., Any]
    view: int

    def requests(self, text: str = "", **fields: Any) -> Iterator[tuple[str, Any]]:
        """Yield each order, in both directions, with requests for the first page and for a deep one."""
        for order, is_descending in product(INDEX[self.table], (False, True)):
            # A token is bound to its listing by this fingerprint; the server refuses any other.
            listing = fingerprint(self.table, text, order, is_descending, fields.get("author_id", 0))
            for token in ("", encode_token(listing, DEEP[order])):
                request = self.request(
                    filter=text,
                    order_by=f"{order} desc" if is_descending else order,
                    page_size=PAGE,
                    page_token=token,
                    view=self.view,
                    **fields,
                )
                yield order, request


LIST_USERS = ListRpc("ListUsers", "users", ListUsersRequest, User.BASIC)
LIST_POSTS = ListRpc("ListPosts", "posts", ListPostsRequest, Post.BASIC)


@dataclass(frozen=True)
class LookUp:
    """A call that looks rows up by a unique key: it may read no more rows than it has keys."""

    rpc: str
    request: Any
    index: str
    keys: int = 1

    @property
    def table(self) -> str:
        return "posts" if "posts" in self.index else "users"


LOOK_UPS = [
    LookUp("GetUser", GetUserRequest(id=7), "pk_users"),
    LookUp("GetUser", GetUserRequest(email=EMAIL), "uq_users_email"),
    LookUp("BatchGetUsers", BatchGetUsersRequest(ids=IDS), "pk_users", len(IDS)),
    LookUp("VerifyPassword", VerifyPasswordRequest(id=7, password="secret"), "pk_users"),
    LookUp("VerifyPassword", VerifyPasswordRequest(email=EMAIL, password="secret"), "uq_users_email"),
    LookUp("GetPost", GetPostRequest(id=7), "pk_posts"),
    LookUp("BatchGetPosts", BatchGetPostsRequest(ids=IDS), "pk_posts", len(IDS)),
]
each_look_up = pytest.mark.parametrize("look_up", LOOK_UPS, ids=lambda look_up: look_up.rpc)
EXPORTS = {"users": ("ExportUsers", ExportUsersRequest), "posts": ("ExportPosts", ExportPostsRequest)}
COUNTS = {"users": ("CountUsers", CountUsersRequest), "posts": ("CountPosts", CountPostsRequest)}
each_table = pytest.mark.parametrize("table", EXPORTS)
LIST_RPCS = {
    "users": LIST_USERS,
    "WITH_POSTS": replace(LIST_USERS, view=User.WITH_POSTS),
    "posts": LIST_POSTS,
    "WITH_AUTHOR": replace(LIST_POSTS, view=Post.WITH_AUTHOR),
}
each_list_rpc = pytest.mark.parametrize("rpc", LIST_RPCS.values(), ids=LIST_RPCS)


class Client:
    """A client of a server in this process that explains the statements of its calls."""

    def __init__(self, channel: grpc.aio.Channel, database: Database) -> None:
        self._methods = vars(UserServiceStub(channel)) | vars(PostServiceStub(channel))
        self._database = database

    async def explain(self, rpc: str, *requests: Any) -> list[Any]:
        """Send requests at once, and return the plans of the statements that read users or posts for them."""
        return await self._plans(await self._reads(rpc, *requests))

    async def explain_first(self, rpc: str, request: Any) -> Any:
        """Send a request, and return the plan of its first statement: the one that reads the page."""
        [plan] = await self._plans((await self._reads(rpc, request))[:1])
        return plan

    async def _reads(self, rpc: str, *requests: Any) -> list[Statement]:
        method = self._methods[rpc]
        with record_statements() as statements:
            await asyncio.gather(*(first_answer(method(request)) for request in requests))
        # Meanwhile the server may also check its health and delete expired rows.
        return [statement for statement in statements if READS_ROWS.match(statement.sql)]

    async def _plans(self, reads: list[Statement]) -> list[Any]:
        explain = EXPLAIN[self._database.engine.dialect.name]
        async with self._database.read() as session:
            connection = await session.connection()
            return [
                (await connection.exec_driver_sql(f"{explain} {sql}", parameters)).all()
                for sql, parameters in reads
            ]


async def first_answer(call: Any) -> None:
    """Wait for the answer of a call, or for the first message of an export; there may be no such row."""
    with suppress(grpc.RpcError):
        if isinstance(call, grpc.aio.UnaryStreamCall):
            await call.read()
            call.cancel()
        else:
            await call


@pytest.fixture(scope="module")
async def large_url(postgres: Postgres, postgresql_template: str) -> AsyncIterator[str]:
    """The URL of a database with 500,000 users and as many posts."""
    async with postgres.database(postgresql_template) as url:
        database = Database(Settings(database_url=url, statement_timeout=FILL_TIMEOUT))
        async with database.begin() as session:
            await fill(await session.connection())
        await database.close()
        yield url


async def fill(connection: AsyncConnection) -> None:
    """Insert the rows, then build the indexes of the migrations: 3 seconds instead of 20."""
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


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[Client]:
    async with serve(url) as server, grpc.aio.insecure_channel(server.address) as channel:
        yield Client(channel, server.database)


@pytest.fixture(scope="module")
async def large(large_url: str) -> AsyncIterator[Client]:
    """A client of a server on the large database."""
    async with client_of(large_url) as client:
        yield client


@pytest.fixture
async def embedded(sqlite_url: str) -> AsyncIterator[Client]:
    """A client of a server on an empty SQLite database; SQLite plans without looking at the rows."""
    async with client_of(sqlite_url) as client:
        yield client


def nodes(plan: Any) -> list[Node]:
    """Return all nodes of a plan of PostgreSQL."""
    [([root],)] = plan
    return list(subtree(root["Plan"]))


def subtree(node: Node) -> Iterator[Node]:
    yield node
    for child in node.get("Plans", []):
        yield from subtree(child)


def scans(plan: list[Node], table: str) -> list[Node]:
    """Return the nodes that read a table, none of which may be a sequential scan."""
    assert "Seq Scan" not in {node["Node Type"] for node in plan}
    return [node for node in plan if node.get("Relation Name") == table]


def rows_read(node: Node) -> int:
    """Return how many rows a node looked at, including those that its filter removed."""
    return int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])


@each_list_rpc
async def test_list_reads_only_rows_of_its_page(large: Client, rpc: ListRpc) -> None:
    """The index of the order finds them at any depth, so that only the page is sorted."""
    for order, request in rpc.requests():
        page = await large.explain_first(rpc.name, request)
        rows = scans(nodes(page), rpc.table)
        assert INDEX[rpc.table][order] in {node.get("Index Name") for node in rows}
        assert max(map(rows_read, rows)) <= PAGE + 1


@each_list_rpc
async def test_list_with_indexed_filter_reads_only_matches(large: Client, rpc: ListRpc) -> None:
    """Holds in every order, for equality and for ranges."""
    for text, matches in NARROW[rpc.table].items():
        for _, request in rpc.requests(text):
            page = await large.explain_first(rpc.name, request)
            rows = scans(nodes(page), rpc.table)
            assert max(map(rows_read, rows)) <= matches


@each_list_rpc
async def test_list_with_unindexed_filter_stops_when_page_is_full(large: Client, rpc: ListRpc) -> None:
    """It walks the index of the order, and neither sorts the table nor reads past the page."""
    for order, request in rpc.requests(CONTAINS[rpc.table]):
        page = await large.explain_first(rpc.name, request)
        rows = scans(nodes(page), rpc.table)
        assert {node["Node Type"] for node in rows} == {"Index Scan"}
        assert INDEX[rpc.table][order] in {node["Index Name"] for node in rows}
        assert max(map(rows_read, rows)) <= 2 * PAGE


@each_table
async def test_count_with_indexed_filter_reads_only_matches(large: Client, table: str) -> None:
    """It reads the index alone, unless the filter names other columns too."""
    rpc, request = COUNTS[table]
    for text, matches in NARROW[table].items():
        count = nodes(await large.explain_first(rpc, request(filter=text)))
        assert max(map(rows_read, scans(count, table)), default=0) <= matches
    index = INDEX[table]["id"]
    [scan] = scans(nodes(await large.explain_first(rpc, request(filter="id > 100 AND id < 9000"))), table)
    assert (scan["Node Type"], scan["Index Name"]) == ("Index Only Scan", index)


@each_table
async def test_count_stops_at_its_limit(large: Client, table: str) -> None:
    """Without a filter, and with one that no index supports."""
    rpc, request = COUNTS[table]
    for text in ("", CONTAINS[table]):
        plan = nodes(await large.explain_first(rpc, request(filter=text, at_most=PAGE)))
        [scan] = [node for node in plan if node.get("Relation Name") == table]
        assert rows_read(scan) <= (3 * PAGE if text else PAGE + 1)


async def test_list_of_one_author_reads_only_its_posts(large: Client) -> None:
    """Holds in every order, also with a filter that no index supports."""
    for text in ("", CONTAINS["posts"]):
        for _, request in LIST_POSTS.requests(text, author_id=77):
            page = await large.explain_first(LIST_POSTS.name, request)
            rows = scans(nodes(page), "posts")
            assert max(map(rows_read, rows)) <= ROWS // 10_000


async def test_list_with_posts_reads_only_newest_posts(large: Client) -> None:
    """The second statement reads the posts of the page's users, one range of the index for each."""
    _, posts = await large.explain("ListUsers", ListUsersRequest(page_size=10, view=User.WITH_POSTS))
    assert max(map(rows_read, scans(nodes(posts), "posts"))) == 10 * ROWS // 10_000


async def test_walk_that_matches_nothing_ends_at_statement_timeout(large_url: str) -> None:
    """A filter without an index costs no more than that."""
    request = ListUsersRequest(filter='email : "nobody"', order_by="email")
    async with (
        serve(large_url, statement_timeout=0.1) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        refused = await refusal(UserServiceStub(channel).ListUsers(request))
    assert refused.reason == "STATEMENT_TIMEOUT"


@each_table
async def test_export_reads_only_rows_of_its_batch(large: Client, table: str) -> None:
    """Each batch starts in the primary key, at any depth."""
    rpc, request = EXPORTS[table]
    for after_id in (0, 400_000):
        batch = await large.explain_first(rpc, request(after_id=after_id, batch_size=PAGE))
        rows = scans(nodes(batch), table)
        assert INDEX[table]["id"] in {node.get("Index Name") for node in rows}
        assert max(map(rows_read, rows)) <= PAGE + 1


@each_table
async def test_filtered_export_stops_when_batch_is_full(large: Client, table: str) -> None:
    """With a filter that no index supports it walks the primary key."""
    rpc, request = EXPORTS[table]
    batch = await large.explain_first(rpc, request(filter=CONTAINS[table], batch_size=PAGE))
    rows = scans(nodes(batch), table)
    assert INDEX[table]["id"] in {node.get("Index Name") for node in rows}
    assert max(map(rows_read, rows)) <= 2 * PAGE


@each_look_up
async def test_look_up_by_key_reads_only_its_rows(large: Client, look_up: LookUp) -> None:
    """One key or a hundred: the index finds each."""
    [plan] = await large.explain(look_up.rpc, look_up.request)
    rows = scans(nodes(plan), look_up.table)
    assert look_up.index in {node.get("Index Name") for node in rows}
    assert max(map(rows_read, rows)) <= look_up.keys


async def test_gathered_look_ups_read_only_their_rows(large: Client) -> None:
    """Concurrent calls share statements, for which the index finds every key."""
    plans = await large.explain("GetUser", *(GetUserRequest(id=id) for id in IDS))
    rows = [node for plan in plans for node in scans(nodes(plan), "users")]
    assert {node.get("Index Name") for node in rows} == {"pk_users"}
    assert sum(map(rows_read, rows)) == len(IDS)


async def first_access(client: Client, rpc: str, request: Any, table: str) -> str:
    """Return how SQLite first reads a table in the first statement of a call."""
    plan = await client.explain_first(rpc, request)
    accesses = [line.detail for line in plan if line.detail.startswith((f"SCAN {table}", f"SEARCH {table}"))]
    return str(accesses[0])


@each_list_rpc
async def test_sqlite_list_walks_index_of_its_order(embedded: Client, rpc: ListRpc) -> None:
    """Holds with and without a filter that no index supports; a deep page starts at its key."""
    for text in ("", CONTAINS[rpc.table]):
        for order, request in rpc.requests(text):
            # The table itself is in id order; the index of a unique constraint has a name of SQLite's own.
            deep = " USING INTEGER PRIMARY KEY" if request.page_token else ""
            index = INDEX[rpc.table][order].replace("uq_users_email", "sqlite_autoindex_users_1")
            way = deep if order == "id" else f" USING INDEX {index}"
            walk = "SEARCH" if request.page_token else "SCAN"
            found = await first_access(embedded, rpc.name, request, rpc.table)
            assert found.startswith(f"{walk} {rpc.table}{way}")


@each_list_rpc
async def test_sqlite_list_searches_index_of_filtered_field(embedded: Client, rpc: ListRpc) -> None:
    """Holds in every order, for equality and for ranges."""
    for text in NARROW[rpc.table]:
        for _, request in rpc.requests(text):
            found = await first_access(embedded, rpc.name, request, rpc.table)
            assert found.startswith(f"SEARCH {rpc.table} USING")


@each_table
async def test_sqlite_export_searches_primary_key(embedded: Client, table: str) -> None:
    """A batch starts after the last id of the one before it."""
    rpc, request = EXPORTS[table]
    found = await first_access(embedded, rpc, request(after_id=7), table)
    assert found.startswith(f"SEARCH {table} USING INTEGER PRIMARY KEY")


@each_look_up
async def test_sqlite_look_up_by_key_searches_index(embedded: Client, look_up: LookUp) -> None:
    """One key or a hundred, though there is no such row."""
    index = {"uq_users_email": "INDEX sqlite_autoindex_users_1"}.get(look_up.index, "INTEGER PRIMARY KEY")
    found = await first_access(embedded, look_up.rpc, look_up.request, look_up.table)
    assert found.startswith(f"SEARCH {look_up.table} USING {index}")
