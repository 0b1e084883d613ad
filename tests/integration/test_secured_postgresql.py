"""PostgreSQL as in production: with TLS, and with separate roles for migrations and for the service."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import pytest
from sqlalchemy import make_url

from roster.errors import DatabaseUnavailable
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import BulkCreatePostsRequest, CreatePostRequest
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import (
    BulkCreateUsersRequest,
    BulkUpdateUsersRequest,
    CreateUserRequest,
    DeleteUserRequest,
    UpdateUserRequest,
)
from service.changes.feed import Feed
from service.changes.kinds import ENTITIES
from service.db import migrations, revisions
from service.db.connect import postgresql_engine
from service.db.engine import Database
from service.db.errors import NoUsableHost, is_transient
from service.db.schema import read_schema
from service.settings import Settings
from tests.support.authority import Authority
from tests.support.command import ROSTER, run
from tests.support.postgres import PostgresServer
from tests.support.server import serve
from tests.support.wire import Wire

ROLES = Path(__file__).parents[2] / "deploy/sql/roles.sql"
REQUEST_ID = "7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10"
FORBIDDEN = [
    "TRUNCATE users CASCADE",
    "DROP TABLE posts",
    "ALTER TABLE users ADD COLUMN extra text",
    "CREATE INDEX ON users (full_name)",
    "CREATE TABLE mine (id int)",
    "CREATE TEMPORARY TABLE mine (id int)",
    "CREATE TRIGGER mine AFTER DELETE ON users EXECUTE FUNCTION log_changes()",
    "ALTER TABLE users DISABLE TRIGGER log_insert",
    "TRUNCATE changes",
    "CREATE FUNCTION mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE ROLE mine",
    "SET ROLE roster_migrator",
    "BEGIN; LOCK TABLE roster_schema IN EXCLUSIVE MODE",
    "UPDATE roster_schema SET version_num = '0001'",
    "DELETE FROM roster_schema",
    "UPDATE schema_compatibility SET min_revision = '0001'",
    "COPY users TO PROGRAM 'cat'",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT passwd FROM pg_shadow",
    "SET log_parameter_max_length = -1",
]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL server for these tests alone, because databases share roles."""
    with PostgresServer() as server:
        yield server


@pytest.fixture(scope="module")
async def url(server: PostgresServer) -> AsyncIterator[str]:
    """A database prepared by the script, which is run twice."""
    async with server.database() as url:
        for _ in range(2):
            await executed(url, ROLES.read_text())
        await asyncio.to_thread(migrations.upgrade, as_role(url, "roster_migrator"))
        yield url


def as_role(url: str, role: str) -> str:
    return make_url(url).set(username=role).render_as_string()


async def executed(url: str, statement: str) -> None:
    connection = await asyncpg.connect(make_url(url).set(drivername="postgresql").render_as_string())
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
async def wire(url: str) -> AsyncIterator[Wire]:
    """A client of a server with the service's role."""
    async with serve(as_role(url, "roster_service")) as server:
        with grpc.insecure_channel(server.address) as channel:
            yield Wire(channel)


async def test_role_of_the_service_suffices(url: str, wire: Wire) -> None:
    """For every kind of write, and for the server's own queries and deletions."""

    async def bulk(rpc: str, kind: Any, **message: Any) -> list[str]:
        events = await wire.call(rpc, kind(finish=True, **message))
        return [event.WhichOneof("event") for event in events if not event.ack.failed]

    user = User(email="ada@example.org", password="x")
    [ada] = await wire.call("CreateUser", CreateUserRequest(user=user, request_id=REQUEST_ID))
    await wire.call("UpdateUser", UpdateUserRequest(user=User(id=ada.id, full_name="Ada")))
    await wire.call("CreatePost", CreatePostRequest(post=Post(author_id=ada.id, title="Notes")))
    settled = ["opened", "ack", "summary"]
    assert settled == await bulk(
        "BulkCreateUsers",
        BulkCreateUsersRequest,
        options=BulkOptions(load_id="staff", on_conflict=BulkOptions.SKIP),
        users=[User(email="alan@example.org"), User(email="ada@example.org")],
    )
    assert settled == await bulk(
        "BulkCreateUsers",
        BulkCreateUsersRequest,
        options=BulkOptions(restore=True),
        users=[User(id=4711, email="grace@example.org")],
    )
    mask: Any = {"paths": ["full_name"]}
    assert settled == await bulk(
        "BulkUpdateUsers",
        BulkUpdateUsersRequest,
        options=BulkOptions(update_mask=mask),
        users=[User(id=4711, full_name="Grace")],
    )
    posts = [Post(author_id=4711, title="Notes")]
    assert settled == await bulk("BulkCreatePosts", BulkCreatePostsRequest, posts=posts)
    await wire.call("DeleteUser", DeleteUserRequest(id=4711))

    database = Database(Settings(database_url=as_role(url, "roster_service")))
    assert (await read_schema(database.engine)).revision == revisions.head()
    await database.close()


@pytest.mark.parametrize("statement", FORBIDDEN)
async def test_role_of_the_service_is_restricted(url: str, statement: str) -> None:
    """It can neither change the schema nor use anything but the tables."""
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await executed(as_role(url, "roster_service"), statement)


@pytest.fixture(scope="module")
async def writer(url: str) -> str:
    """The URL for a role that may write users and nothing else of Roster, and has a schema of its own."""
    name = make_url(url).database
    await executed(
        url,
        f"""
        CREATE ROLE writer LOGIN;
        GRANT CONNECT, CREATE, TEMPORARY ON DATABASE {name} TO writer;
        GRANT USAGE ON SCHEMA public TO writer;
        GRANT SELECT, INSERT, UPDATE, DELETE ON users TO writer;
        GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO writer;
        """,
    )
    await executed(as_role(url, "writer"), "CREATE SCHEMA elsewhere")
    return as_role(url, "writer")


WRITE = """
    INSERT INTO public.users (email) VALUES ('writer@example.org');
    UPDATE public.users SET version = 2 WHERE email = 'writer@example.org';
    DELETE FROM public.users WHERE email = 'writer@example.org';
"""


@pytest.mark.parametrize(
    "prelude",
    [
        "",
        "CREATE TEMPORARY TABLE changes (LIKE public.users); SET search_path = pg_temp, public;",
        "CREATE TABLE elsewhere.changes (entity text, ids bytea); SET search_path = elsewhere;",
        "SET search_path = '';",
    ],
)
async def test_changes_by_other_roles_are_logged(prelude: str, url: str, writer: str) -> None:
    """They need no right to the log, and can't divert it."""
    database = Database(Settings(database_url=as_role(url, "roster_service")))
    feed = Feed(database)
    token = (await feed.now()).for_entities(ENTITIES)
    await executed(writer, prelude + WRITE)
    await executed(writer, "DROP TABLE IF EXISTS elsewhere.changes")
    [change] = (await feed.read(token)).changes
    assert change.deleted_user_id
    await database.close()


async def test_other_roles_cannot_use_the_functions_of_the_log(writer: str) -> None:
    """With a table of their own, whose log would be written with the rights of Roster's owner."""
    for function in ("log_changes", "reset_feed", "begin_feed"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match=f"for function public.{function}"):
            await executed(
                writer,
                f"""
                CREATE TABLE elsewhere.{function} (id bigint);
                CREATE TRIGGER mine AFTER INSERT ON elsewhere.{function} REFERENCING NEW TABLE AS changed
                FOR EACH STATEMENT EXECUTE FUNCTION public.{function}();
                """,
            )
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="for table changes"):
        await executed(writer, "SELECT * FROM changes")


async def test_other_roles_cannot_connect(url: str) -> None:
    """Even if they exist in the same PostgreSQL."""
    await executed(url, "CREATE ROLE stranger LOGIN")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await executed(as_role(url, "stranger"), "SELECT 1")


async def test_postgresql_logs_no_values(server: PostgresServer, url: str) -> None:
    """Its log has the errors without the rows."""
    connection = await asyncpg.connect(
        make_url(as_role(url, "roster_service")).set(drivername="postgresql").render_as_string()
    )
    for _ in range(2):
        row = connection.execute("INSERT INTO users (email, full_name) VALUES ($1, $2)", "xyzzy@x", "xyzzy")
        await asyncio.gather(row, return_exceptions=True)
    await connection.close()

    assert "duplicate key" in server.log()
    assert "xyzzy" not in server.log()


@pytest.fixture(scope="module")
def authority() -> Authority:
    """The CA of `tls_url`."""
    return Authority()


@pytest.fixture(scope="module")
async def tls_url(authority: Authority) -> AsyncIterator[str]:
    """A database on a PostgreSQL that accepts only TLS."""
    server, pair = PostgresServer(), authority.issue("127.0.0.1")
    server.require_tls(pair.cert, pair.key)
    with ExitStack() as stack:
        try:
            stack.enter_context(server)
        except RuntimeError as error:
            if "SSL is not supported by this build" not in str(error):
                raise
            pytest.skip("the PostgreSQL found here was built without TLS")
        async with server.database() as url:
            yield url


@pytest.mark.parametrize("name", ["ssl", "sslmode"])
async def test_verifies_certificate_of_postgresql(
    tls_url: str, authority: Authority, tmp_path: Path, name: str
) -> None:
    """With `verify-full` the CA must have signed it for the host of the URL; migrations verify it too."""
    ours, strange = authority.write(tmp_path), tmp_path / "strange.pem"
    strange.write_bytes(Authority().cert)

    def secured(host: str, root: Path) -> str:
        query = {name: "verify-full", "sslrootcert": str(root)}
        return make_url(tls_url).set(host=host, query=query).render_as_string()

    await asyncio.to_thread(migrations.upgrade, secured("127.0.0.1", ours))
    assert await reached(secured("127.0.0.1", ours))
    assert not await reached(secured("127.0.0.1", strange))
    assert not await reached(secured("localhost", ours))
    assert not await reached(make_url(tls_url).set(query={name: "disable"}).render_as_string())


@pytest.mark.parametrize(
    "query",
    [
        "sslmode=verify-full&sslrootcert=system",
        "sslrootcert=system",
        "sslmode=require&channel_binding=require",
        "sslrootcert=system&ssl_min_protocol_version=TLSv1.3",
    ],
)
async def test_system_certificates_verify_postgresql(
    query: str, tls_url: str, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL's variable names what the system trusts; channel binding is replaced by this."""
    strange = tmp_path / "strange.pem"
    strange.write_bytes(Authority().cert)
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.write(tmp_path)))
    assert await reached(f"{tls_url}?{query}")

    monkeypatch.setenv("SSL_CERT_FILE", str(strange))
    assert not await reached(f"{tls_url}?{query}")
    engine = postgresql_engine(f"{tls_url}?{query}", timeout=10)
    with pytest.raises(NoUsableHost, match="the certificate can't be verified: ") as caught:
        await read_schema(engine)
    assert not is_transient(caught.value)
    await engine.dispose()


async def reached(url: str) -> bool:
    database = Database(Settings(database_url=url))
    try:
        await database.ping()
    except DatabaseUnavailable:
        return False
    finally:
        await database.close()
    return True


async def test_server_without_rights_on_the_schema_says_what_to_grant(url: str, tmp_path: Path) -> None:
    """It does not wait for them."""
    await executed(url, "REVOKE SELECT ON roster_schema FROM roster_service")
    refused = await run(ROSTER, "serve", folder=tmp_path, ROSTER_DATABASE_URL=as_role(url, "roster_service"))
    assert refused.status == 2
    assert "permission denied for table roster_schema; let the owner of the schema run" in refused.err
