"""Two real sites, loaded with `roster load` and read back through the API."""

import gzip
import hashlib
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from roster.v1.posts_pb2 import ExportPostsRequest
from roster.v1.posts_pb2_grpc import PostServiceStub
from roster.v1.users_pb2 import ExportUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.support.command import ROSTER, run, serving
from tests.support.postgres import Postgres

DATA = Path(__file__).parents[1] / "data/stackexchange"
SITES = ("quantum", "french")
USERS = {"quantum": 3461, "french": 1703}
POSTS = {"quantum": 1986, "french": 781}
WITHOUT_AUTHOR = {"quantum": 2, "french": 33}
# The author given to the rejected posts without one.
ADOPTER = "-1@french.stackexchange.example"

Row = dict[str, Any]


class Sites:
    """A server into which both sites are loaded one by one.

    `loaded` has the status and counts of each load, by its name.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self.address = address
        self.folder = folder
        self.loaded: dict[str, Row] = {}

    async def load(self, entity: str, file: str | Path, *options: str, stdin: bytes = b"") -> Row:
        """Load a file, and return its summary and exit status."""
        options = ("--address", self.address, "--json", *options)
        ended = await run(ROSTER, "load", entity, file, *options, folder=self.folder, stdin=stdin)
        assert ended.out, ended.err
        return {"status": ended.status, **json.loads(ended.out)}

    async def load_all(self) -> None:
        """Load users and posts of each site, then the corrected rejects."""
        for site in SITES:
            rejects = str(self.rejects(site))
            self.loaded[f"{site} users"] = await self.load("users", source(site, "users"))
            self.loaded[f"{site} posts"] = await self.load(
                "posts", source(site, "posts"), "--rejects", rejects
            )
        self.loaded["corrected"] = await self.load("posts", self.correct_rejects())

    def rejects(self, site: str) -> Path:
        """Return the path of the rejected posts of a site."""
        return self.folder / f"{site}.rejects.ndjson"

    def correct_rejects(self) -> Path:
        """Write the rejects of both sites with an author to one file, and return its path."""
        path = self.folder / "corrected.ndjson"
        lost = [row for site in SITES for row in rows(self.rejects(site))]
        path.write_text("".join(json.dumps({**row, "author_email": ADOPTER}) + "\n" for row in lost))
        return path


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
async def sites(
    request: pytest.FixtureRequest,
    postgres: Postgres,
    postgresql_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Sites]:
    """Both sites on one database, loaded once for all tests."""
    folder = tmp_path_factory.mktemp("stackexchange")
    async with AsyncExitStack() as stack:
        url = "sqlite:///roster.db"
        if request.param == "postgresql":
            url = await stack.enter_async_context(postgres.database(postgresql_template))
        server = await stack.enter_async_context(serving(folder, ROSTER_DATABASE_URL=url))
        sites = Sites(server.address, folder)
        await sites.load_all()
        yield sites


def source(site: str, entity: str) -> Path:
    return DATA / site / f"{entity}.ndjson.gz"


def rows(path: Path) -> list[Row]:
    content = path.read_bytes()
    plain = gzip.decompress(content) if path.suffix == ".gz" else content
    return [json.loads(line) for line in plain.splitlines()]


def of_both(entity: str) -> list[Row]:
    return [row for site in SITES for row in rows(source(site, entity))]


def digest(rows: Iterable[tuple[str, ...]]) -> str:
    """Return one digest of all rows, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()


def counts(load: Row) -> tuple[int, int, int]:
    return load["status"], load["created"], load["failed"]


@pytest.mark.parametrize("site", SITES)
def test_every_user_is_created(sites: Sites, site: str) -> None:
    """The status of a load without failed rows is 0."""
    assert counts(sites.loaded[f"{site} users"]) == (0, USERS[site], 0)


@pytest.mark.parametrize("site", SITES)
def test_posts_without_an_author_are_rejected(sites: Sites, site: str) -> None:
    """The rejects have the reason, the other rows are loaded, and the status is 1."""
    lost = WITHOUT_AUTHOR[site]
    assert counts(sites.loaded[f"{site} posts"]) == (1, POSTS[site] - lost, lost)

    rejects = rows(sites.rejects(site))
    errors = [row.pop("_error") for row in rejects]
    assert rejects == [row for row in rows(source(site, "posts")) if "author_email" not in row]
    assert {(error["reason"], error["field"]) for error in errors} == {("INVALID_FIELD", "author_id")}


def test_corrected_rejects_load(sites: Sites) -> None:
    """With an author; the reason in each row is ignored."""
    assert counts(sites.loaded["corrected"]) == (0, sum(WITHOUT_AUTHOR.values()), 0)


async def test_loading_again_creates_nothing(sites: Sites) -> None:
    """Both files at once through a pipe, because gzip files can be concatenated."""
    both = b"".join(source(site, "users").read_bytes() for site in SITES)
    again = await sites.load("users", "-", "--on-conflict", "skip", stdin=both)

    assert (again["status"], again["created"], again["skipped"]) == (0, 0, sum(USERS.values()))


async def test_exports_equal_the_input(sites: Sites) -> None:
    """All users and all posts, to the byte."""
    async with grpc.aio.insecure_channel(sites.address) as channel:
        exported = UserServiceStub(channel).ExportUsers(ExportUsersRequest())
        users = [user async for message in exported for user in message.users]
        exported_posts = PostServiceStub(channel).ExportPosts(ExportPostsRequest())
        posts = [post async for message in exported_posts for post in message.posts]

    assert (len(users), len(posts)) == (5164, 2767)
    assert digest((user.email, user.full_name) for user in users) == digest(
        (row["email"], row["full_name"]) for row in of_both("users")
    )
    email = {user.id: user.email for user in users}
    assert digest((post.title, post.content, email[post.author_id]) for post in posts) == digest(
        (row["title"], row["content"], row.get("author_email", ADOPTER)) for row in of_both("posts")
    )
