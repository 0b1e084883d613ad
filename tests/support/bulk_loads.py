"""Random bulk loads over few keys, cut into random messages."""

from itertools import pairwise
from operator import or_
from typing import Any

from hypothesis import strategies as st

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.posts_pb2 import PostKey
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import UserKey
from tests.support.bulk_model import ADA, BAD, BOB, CYD, EMAILS, HASHES, Load, Values
from tests.support.items import Item

UNKNOWN = 7
# Texts that are special in COPY, in JSON or in UTF-16.
TEXTS = ["Ada", "", "\\N", "\\.\n", "a\tb\r\nc\\", "\"'{},", "\U0001d49cda", "\u2028"]
KEYS = {
    "id": st.sampled_from([ADA, BOB, CYD, ADA, BOB, CYD, UNKNOWN]),
    "version": st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3]),
}
USER = {
    "email": st.sampled_from(list(EMAILS)),
    "full_name": st.sampled_from([None, *TEXTS]),
    "is_active": st.sampled_from([True, False, True, False, None]),
    "hashed_password": st.sampled_from([*HASHES, *HASHES, None]),
}
POST = {"title": st.sampled_from([text for text in TEXTS if text]), "content": st.sampled_from(TEXTS)}
AUTHORS: list[dict[str, Any]] = [
    *({"author_id": id} for id in (ADA, BOB, CYD, ADA, BOB, CYD, UNKNOWN)),
    *({"author_email": email} for email in EMAILS),
    {},
    {"author_id": ADA, "author_email": "ada@example.org"},
]


@st.composite
def loads(
    draw: st.DrawFn, /, kind: str, row: st.SearchStrategy[Any], **options: st.SearchStrategy[Any]
) -> Load:
    """Draw a load of a kind over few keys, cut into random messages; some rows are invalid."""
    chosen = BulkOptions(
        return_ids=True,
        atomicity=draw(st.sampled_from([BulkOptions.ROW, BulkOptions.ROW, BulkOptions.BATCH])),
        validate_only=draw(st.sampled_from([False, False, False, False, True])),
        **{name: draw(strategy) for name, strategy in options.items()},
    )
    rows = draw(st.lists(row, min_size=1, max_size=10))
    cuts = sorted(draw(st.sets(st.integers(1, len(rows)), max_size=2)) | {0, len(rows)})
    return Load(kind, chosen, [rows[begin:end] for begin, end in pairwise(cuts)])


def masks(*paths: str) -> st.SearchStrategy[Any]:
    """Return update masks that name some of the paths."""
    return st.lists(st.sampled_from(paths), min_size=1, unique=True).map(lambda some: {"paths": some})


@st.composite
def _rows(draw: st.DrawFn, /, message: type[Any], values: st.SearchStrategy[Values], bad: str) -> Any:
    row = draw(values)
    if draw(st.integers(0, 9)) == 0:
        field = draw(st.sampled_from(bad.split()))
        row[field] = draw(st.sampled_from(BAD[field]))
    return message(**row)


NAMED = ("full_name", "is_active", "hashed_password")
NEW_USERS = _rows(User, st.fixed_dictionaries(USER), "email full_name hashed_password password")
CHANGED_USERS = _rows(User, st.fixed_dictionaries(KEYS | USER), "id version email full_name password")
# Few users and few e-mails, so that one gets what another has just left.
MOVES = st.builds(User, id=st.sampled_from([ADA, BOB, CYD]), email=st.sampled_from(list(EMAILS)[1:5]))
NEW_POSTS = _rows(
    Post,
    st.builds(or_, st.fixed_dictionaries(POST), st.sampled_from(AUTHORS)),
    "title content author_id author_email",
)
CHANGED_POSTS = _rows(Post, st.fixed_dictionaries(KEYS | POST), "id version title content")
# By id and by e-mail in one load, some of them the same user.
USER_KEYS = st.one_of(
    _rows(UserKey, st.fixed_dictionaries(KEYS), "id version"),
    _rows(
        UserKey, st.fixed_dictionaries({"email": USER["email"], "version": KEYS["version"]}), "email version"
    ),
    st.just(UserKey()),
)
POST_KEYS = _rows(PostKey, st.fixed_dictionaries(KEYS), "id version")
MISSING = st.sampled_from([BulkOptions.FAIL_MISSING, BulkOptions.SKIP_MISSING])
ITEM = {
    "slug": st.sampled_from("abcdef"),
    "code": st.sampled_from([0, 1, 2, 3, 4, 5]),
    "times": st.integers(0, 9),
    "expected": st.sampled_from(["", "0", "1"]),
}
NEW_ITEMS = _rows(Item, st.fixed_dictionaries(ITEM), "slug")
CHANGED_ITEMS = _rows(Item, st.fixed_dictionaries(KEYS | ITEM), "id version slug")
ITEM_MOVES = st.builds(
    Item,
    id=st.sampled_from([ADA, BOB, CYD]),
    slug=st.sampled_from("abcd"),
    code=st.sampled_from([0, 1, 2, 3]),
)
RESTORED_ITEMS = _rows(
    Item,
    st.fixed_dictionaries(
        ITEM | {"id": st.sampled_from([ADA, BOB, 11, 12, 13, 14]), "version": st.integers(0, 5)}
    ),
    "slug",
)
FAIL_OR_SKIP = st.sampled_from([BulkOptions.FAIL, BulkOptions.SKIP])
LOADS = {
    "create users": loads("create users", NEW_USERS, on_conflict=FAIL_OR_SKIP),
    "create or update users": loads(
        "create users", NEW_USERS, on_conflict=st.just(BulkOptions.UPDATE), update_mask=masks(*NAMED)
    ),
    "update users": loads("update users", CHANGED_USERS, update_mask=masks("email", *NAMED)),
    "swap e-mails": loads("update users", MOVES, update_mask=masks("email")),
    "create posts": loads("create posts", NEW_POSTS),
    "update posts": loads("update posts", CHANGED_POSTS, update_mask=masks("title", "content")),
    "delete users": loads("delete users", USER_KEYS, on_missing=MISSING, restrict=st.booleans()),
    "delete posts": loads("delete posts", POST_KEYS, on_missing=MISSING),
    "create items": loads("create items", NEW_ITEMS, on_conflict=FAIL_OR_SKIP),
    "create or update items": loads(
        "create items",
        NEW_ITEMS,
        on_conflict=st.just(BulkOptions.UPDATE),
        update_mask=masks("times", "expected"),
    ),
    "restore items": loads(
        "create items", RESTORED_ITEMS, on_conflict=FAIL_OR_SKIP, restore=st.just(value=True)
    ),
    "update items": loads(
        "update items", CHANGED_ITEMS, update_mask=masks("slug", "code", "times", "expected")
    ),
    "swap slugs and codes": loads("update items", ITEM_MOVES, update_mask=masks("slug", "code")),
}
