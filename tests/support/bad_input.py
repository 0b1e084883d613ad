"""Invalid requests to every RPC, each with its reason and the violated field."""

import zlib
from typing import Any

from service.validation import MAX_ID
from tests.support.changes import encode, forge

# In every bad text; in no answer.
SECRET = "xyzzy"
HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHRzb21lc2FsdA$RdescudvJCsgt3ub+b5dWRWJTmaaJObG"
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
UNKNOWN_VALUE = 99
BAD_LOAD_IDS = [SECRET + "x" * 251, f"{SECRET}\0"]
BAD_CALLERS = [SECRET + "x" * 251, f"{SECRET}\0"]

# What is sent, the reason it is refused for, and the field at fault.
Bad = tuple[Any, str, str]


def at(path: str, value: Any) -> dict[str, Any]:
    """Return a request with only one field, as in {"user": {"id": 1}} for "user.id"."""
    for name in reversed(path.split(".")):
        value = {name: value}
    return value  # type: ignore[no-any-return]


def merge(request: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a request with the fields of both."""
    shared = {name: merge(request[name], other[name]) for name in request.keys() & other.keys()}
    return {**request, **other, **shared}


def bad_values(path: str, values: list[Any], **rest: Any) -> list[Bad]:
    """Return a request for each bad value of one field."""
    return [(merge(rest, at(path, value)), "INVALID_FIELD", path) for value in values]


def bad_ids(path: str, **rest: Any) -> list[Bad]:
    return bad_values(path, [0, -1, MAX_ID + 1, INT64_MIN, INT64_MAX], **rest)


def bad_versions(path: str, **rest: Any) -> list[Bad]:
    return bad_values(path, [-1, INT64_MIN], **rest)


def bad_request_ids(**rest: Any) -> list[Bad]:
    texts = [SECRET, "0" * 31, f"{'0' * 8}-{SECRET}\0", "+" + "0" * 31, "٣" * 32]
    return bad_values("request_id", texts, **rest)


def bad_views(**rest: Any) -> list[Bad]:
    return bad_values("view", [UNKNOWN_VALUE, -1, INT32_MIN], **rest)


def bad_masks(paths: list[str], *, path: str = "update_mask", **rest: Any) -> list[Bad]:
    everywhere = [SECRET, "", "*.*", "full_name.x", "version", "id", "created_at", "updated_at"]
    masks = [[name] for name in [*everywhere, *paths]] + [["*", "title", "email"]]
    return [(merge(rest, at(path, {"paths": mask})), "INVALID_MASK", path) for mask in masks]


def bad_filters() -> list[Bad]:
    texts = [
        f"{SECRET} ",
        f'email = "{SECRET}',
        f"title = {SECRET} OR",
        f'id = "{SECRET}"',
        "id : 1",
        "id",
        "id =",
        "(id = 1",
        "id = 1)",
        "id = 1 and id = 2",
        "id = 9223372036854775999",
        "id = 1 " * 300,
        "id = null",
        "created_at > 'yesterday'",
        "created_at > '0001-01-01T00:00:00+23:59'",
        "created_at > '2024-02-30T00:00:00Z'",
        "hashed_password = 'x'",
        "\U0001f600" * 100 + " = 1",
        "NOT " * 21 + "id = 1",
        "(" * 1000,
        "\0",
        "id = 1 OR id = '\0'",
    ]
    return [(at("filter", text), "INVALID_FILTER", "filter") for text in texts]


def bad_lists(*unsortable: str) -> list[Bad]:
    orders = [SECRET, "id,created_at", "id sideways", "id asc asc", "ID", "version", "-id", "\0", *unsortable]
    tokens = [SECRET, "!", "a", "é", "\0", "AAAA", "QUJD" * 1000]
    return [
        *bad_values("page_size", [-1, INT32_MIN]),
        *bad_filters(),
        *[(at("order_by", text), "INVALID_ORDER", "order_by") for text in orders],
        *[(at("page_token", token), "INVALID_PAGE_TOKEN", "page_token") for token in tokens],
        *bad_views(),
    ]


def bad_exports() -> list[Bad]:
    return [
        *bad_filters(),
        *bad_values("after_id", [-1, MAX_ID + 1, INT64_MIN, INT64_MAX]),
        *bad_values("batch_size", [-1, INT32_MIN, INT32_MAX, 1001]),
    ]


def bad_counts() -> list[Bad]:
    return [*bad_filters(), *bad_values("at_most", [-1, 1_000_001, INT64_MIN, INT64_MAX])]


def bad_batches() -> list[Bad]:
    return [
        ({}, "INVALID_FIELD", "ids"),
        *[({"ids": [77, id]}, "INVALID_FIELD", "ids[1]") for id in (0, -1, MAX_ID + 1, INT64_MIN, INT64_MAX)],
        ({"ids": range(1, 1002)}, "TOO_LARGE", "ids"),
        *bad_views(ids=[77]),
    ]


def bad_streams(rows: str, row: dict[str, Any], **needed: Any) -> list[Bad]:
    """Return messages that end a bulk stream; `needed` are the options that it requires."""
    first = {"options": needed, rows: [row]}
    return [
        ([], "INVALID_OPTIONS", ""),
        ([first, b"\xff"], "MALFORMED_MESSAGE", ""),
        ([first, first], "INVALID_OPTIONS", "options"),
        ([first, {"options": {}}], "INVALID_OPTIONS", "options"),
        *[
            ({"options": {**needed, name: value}}, "INVALID_FIELD", f"options.{name}")
            for name in ("on_conflict", "atomicity", "on_missing")
            for value in (UNKNOWN_VALUE, -1)
        ],
        *[
            ({"options": {**needed, "max_failures": number}}, "INVALID_OPTIONS", "options.max_failures")
            for number in (-1, INT64_MIN)
        ],
        *bad_values("options.load_id", [*BAD_LOAD_IDS, "a\nb", "a\u202eb"], options=needed),
        *bad_values("options.caller", BAD_CALLERS, options={**needed, "load_id": "some load"}),
        ({"options": {**needed, "caller": SECRET}}, "INVALID_OPTIONS", "options.caller"),
    ]


def bad_loads() -> list[Bad]:
    """Return what can't name a load."""
    return [
        *bad_values("load_id", ["", *BAD_LOAD_IDS]),
        *bad_values("caller", BAD_CALLERS, load_id="some load"),
    ]


def bad_lists_of_a_load() -> list[Bad]:
    return [
        *bad_loads(),
        *bad_values("page_size", [-1, INT32_MIN], load_id="some load"),
        ({"load_id": "some load", "page_token": SECRET}, "INVALID_PAGE_TOKEN", "page_token"),
    ]


def bad_options(reason: str, field: str, *several: dict[str, Any]) -> list[Bad]:
    return [({"options": options}, reason, f"options.{field}") for options in several]


TITLE = {"paths": ["title"]}
# A valid CreateUser that updates.
ENSURED: dict[str, Any] = {
    "user": {"email": "ada@example.org"},
    "on_conflict": 2,
    "update_mask": {"paths": ["full_name"]},
}
EMAIL = {"paths": ["email"]}

BAD_EMAILS = [
    "",
    " ",
    SECRET,
    f"{SECRET}@",
    f"@{SECRET}",
    f"{SECRET}@example@org",
    f"{SECRET} two@example.org",
    f"{SECRET}\u00a0@example.org",
    f"{SECRET}\0@example.org",
    f"{SECRET}@{'x' * 250}",
    # Normalising it to NFC takes minutes.
    SECRET + "\u0301\u0316" * 15_000 + "@example.org",
]
BAD_NAMES = [SECRET + "x" * 251, f"{SECRET}\0"]
BAD_TITLES = ["", SECRET + "x" * 251, f"{SECRET}\0"]
BAD_CONTENTS = [f"{SECRET}\0", SECRET + "x" * (1 << 20), SECRET + "é" * (1 << 19)]
BAD_PASSWORDS = [SECRET + "x" * 1020, f"{SECRET}\0"]
BAD_HASHES = [
    SECRET,
    f"$2b$12${SECRET}",
    f"{HASH}{SECRET}" * 9,
    f"{HASH}\n",
    HASH.replace("m=65536", "m=9999999"),
    HASH.replace("p=4", "p=0"),
]

FEED_ID = "0" * 32
NO_NUMBERS: list[Any] = [-1, 1 << 63, 1.5, "1", None, True, [], float("nan")]
NO_ENTRIES: list[Any] = [
    "",
    SECRET,
    "-1",
    "1.5",
    "1e3",
    "٣",
    " 1",
    "9223372036854775808",
    "1" * 5000,
    None,
    1,
    [],
]
NO_SNAPSHOTS: list[Any] = [
    *("1:2", "1:2:3:4", ":2:", "1::", "1:2:,", "1:2:1,", "1:2:\n", "1:2:\0", "a:b:c", "0:2:", "0:0:", "2:1:"),
    *("1:2:0", "1:2:2", "1:2:3", "1:5:3,2", "1:5:2,2", "2:5:1", "1:٣:", f"1:{1 << 63}:", SECRET),
]
NO_LISTS: list[Any] = [None, 1, SECRET, [-1], ["1"], [[1]], [None]]


def token(since: Any = "1:2:", until: Any = "", *rest: Any) -> str:
    """Return a token of a feed with a valid id, and with a valid checksum."""
    return forge(FEED_ID, since, until, *(rest or (0, 0, 0, [])))


FORGED_TOKENS = [
    forge(),
    forge(FEED_ID),
    forge({"feed_id": FEED_ID}),
    *[forge(feed_id, "1:2:", "", 0, 0, 0, []) for feed_id in (SECRET, FEED_ID[1:], "", None, 1, [FEED_ID])],
    *[token(since) for since in [*NO_ENTRIES, *NO_SNAPSHOTS]],
    *[token("5", until) for until in ("5", "1:2:", SECRET)],
    *[token("1:2:", until) for until in [*NO_SNAPSHOTS, "5", None, 7, {}]],
    *[token("1:2:", "1:3:", number, 0, 0, []) for number in NO_NUMBERS],
    *[token("1:2:", "1:3:", 0, number, 0, []) for number in NO_NUMBERS],
    *[token("1:2:", "1:3:", 0, 0, number, []) for number in [*NO_NUMBERS, 5001]],
    *[token("1:2:", "", 0, 0, 0, entities) for entities in [*NO_LISTS, [1] * 80_000]],
    token("1:2:", "", 0, 0, 0, [], 1),
    encode(zlib.compress(b"[" * 100_000)),
    encode(zlib.compress(b"9" * 100_000)),
    encode(zlib.compress(b" " * (32 << 20))),
    encode(zlib.compress(b"[]")[:-4]),
    encode(zlib.compress(b"\xff")),
    encode(zlib.compress(b"[]"), version=b"\x02"),
    encode(b""),
    encode(SECRET.encode()),
    token()[1:],
    "B" + token()[1:],
]


def bad_feeds() -> list[Bad]:
    """Return requests of a feed with unknown entities, damaged tokens, and forged ones."""
    damaged = [SECRET, "!", "a", "é", "\0", "AAAA", "QUJD" * 1000]
    return [
        *[({"entities": [1, value]}, "INVALID_FIELD", "entities[1]") for value in (0, 3, -1, UNKNOWN_VALUE)],
        *bad_values("token", [*damaged, *FORGED_TOKENS]),
        ({"token": token("1:2:", "", 0, 0, 0, [1]), "entities": [1, 2]}, "INVALID_FIELD", "token"),
        ({"token": token("1:2:", "", 0, 0, 0, [1, 99])}, "INVALID_FIELD", "token"),
    ]


TABLE: dict[str, list[Bad]] = {
    "CreateUser": [
        ({}, "INVALID_FIELD", "user.email"),
        *bad_values("user.email", BAD_EMAILS),
        *bad_values("user.full_name", BAD_NAMES, user={"email": "ada@example.org"}),
        *bad_values("user.password", BAD_PASSWORDS, user={"email": "ada@example.org"}),
        *bad_values("user.password", [SECRET], user={"email": "ada@example.org", "hashed_password": HASH}),
        *bad_values("user.hashed_password", BAD_HASHES, user={"email": "ada@example.org"}),
        *bad_request_ids(user={"email": "ada@example.org"}),
        *bad_request_ids(user={"email": "ada@example.org"}, validate_only=True),
        *bad_values("on_conflict", [UNKNOWN_VALUE, -1, INT32_MIN], user={"email": "ada@example.org"}),
        *[({**ENSURED, "on_conflict": mode}, "INVALID_MASK", "update_mask") for mode in (0, 1)],
        ({**ENSURED, "update_mask": {"paths": []}}, "INVALID_MASK", "update_mask"),
        *bad_masks(["email", "posts", "fullName"], user={"email": "ada@example.org"}, on_conflict=2),
        *bad_values("user.version", [1, -1, INT64_MAX], **ENSURED),
        *[
            ({**ENSURED, "update_mask": {"paths": [name]}}, "INVALID_FIELD", f"user.{name}")
            for name in ("is_active", "password", "hashed_password")
        ],
        ({**ENSURED, "update_mask": {"paths": ["*"]}}, "INVALID_FIELD", "user.is_active"),
        *bad_values("user.password", [SECRET], **merge(ENSURED, {"user": {"hashed_password": HASH}})),
    ],
    "GetUser": [
        ({}, "INVALID_FIELD", "id"),
        *bad_ids("id"),
        *bad_values("email", BAD_EMAILS),
        *bad_views(id=77),
    ],
    "BatchGetUsers": bad_batches(),
    "ListUsers": bad_lists("full_name", "title"),
    "UpdateUser": [
        *bad_ids("user.id"),
        *bad_versions("user.version", user={"id": 77}),
        *bad_masks(["posts", "posts.title", "fullName"], user={"id": 77}),
        ({"user": {"id": 77}}, "INVALID_FIELD", "user"),
        *[
            ({"user": {"id": 77}, "update_mask": {"paths": [name]}}, "INVALID_FIELD", f"user.{name}")
            for name in ("email", "is_active", "password", "hashed_password")
        ],
        *bad_values("user.email", BAD_EMAILS[1:], user={"id": 77}),
        *bad_values("user.full_name", BAD_NAMES, user={"id": 77}),
        *bad_values("user.password", BAD_PASSWORDS, user={"id": 77}),
        *bad_values("user.password", [SECRET], user={"id": 77, "hashed_password": HASH}),
        *bad_values("user.hashed_password", BAD_HASHES, user={"id": 77}),
        *bad_request_ids(user={"id": 77, "full_name": "Ada"}),
    ],
    "DeleteUser": [*bad_ids("id"), *bad_versions("version", id=77), *bad_request_ids(id=77)],
    "VerifyPassword": [
        ({}, "INVALID_FIELD", "id"),
        *bad_ids("id", password=SECRET),
        *bad_values("email", BAD_EMAILS, password=SECRET),
        *bad_values("password", ["", *BAD_PASSWORDS], id=77),
    ],
    "BulkCreateUsers": [
        *bad_streams("users", {"email": "ada@example.org"}),
        *bad_options("INVALID_OPTIONS", "update_mask", {"on_conflict": 2}, {"update_mask": EMAIL}),
        *bad_options("INVALID_OPTIONS", "update_mask", {"on_conflict": 1, "update_mask": EMAIL}),
        *bad_masks(["email", "password"], path="options.update_mask", options={"on_conflict": 2}),
    ],
    "BulkUpdateUsers": [
        *bad_streams("users", {"id": 77}, update_mask=EMAIL),
        *bad_options("INVALID_OPTIONS", "update_mask", {}),
        *bad_options("INVALID_OPTIONS", "on_conflict", {"on_conflict": 1, "update_mask": EMAIL}),
        *bad_options("INVALID_OPTIONS", "on_conflict", {"on_conflict": 2, "update_mask": EMAIL}),
        *bad_options("INVALID_OPTIONS", "restore", {"restore": True, "update_mask": EMAIL}),
        *bad_masks(["password", "posts"], path="options.update_mask"),
    ],
    "BulkDeleteUsers": [
        *bad_streams("users", {"id": 77}),
        *bad_options("INVALID_OPTIONS", "on_conflict", {"on_conflict": 1}),
        *bad_options("INVALID_OPTIONS", "update_mask", {"update_mask": EMAIL}),
        *bad_options("INVALID_OPTIONS", "restore", {"restore": True}),
    ],
    "CountUsers": bad_counts(),
    "ExportUsers": bad_exports(),
    "GetBulkLoad": bad_loads(),
    "ListBulkLoads": [
        *bad_values("page_size", [-1, INT32_MIN]),
        *bad_values("caller", BAD_CALLERS),
        ({"page_token": SECRET}, "INVALID_PAGE_TOKEN", "page_token"),
    ],
    "ListBulkLoadFailures": bad_lists_of_a_load(),
    "ListBulkLoadRows": bad_lists_of_a_load(),
    "AbortBulkLoad": bad_loads(),
    "CreatePost": [
        *bad_ids("post.author_id", post={"title": "Notes"}),
        *bad_values("post.author_email", [f"{SECRET}@example.org"], post={"author_id": 77, "title": "Notes"}),
        *bad_values("post.title", BAD_TITLES, post={"author_id": 77}),
        *bad_values("post.content", BAD_CONTENTS, post={"author_id": 77, "title": "Notes"}),
        *bad_request_ids(post={"author_id": 77, "title": "Notes"}),
    ],
    "GetPost": [*bad_ids("id"), *bad_views(id=77)],
    "BatchGetPosts": bad_batches(),
    "ListPosts": [
        *bad_lists("title", "author_id", "email"),
        *bad_values("author_id", [-1, MAX_ID + 1, INT64_MIN, INT64_MAX]),
    ],
    "CountPosts": [*bad_counts(), *bad_values("author_id", [-1, MAX_ID + 1, INT64_MIN, INT64_MAX])],
    "UpdatePost": [
        *bad_ids("post.id"),
        *bad_versions("post.version", post={"id": 77}),
        *bad_masks(["author_id", "author", "author.email", "author_email"], post={"id": 77}),
        ({"post": {"id": 77}}, "INVALID_FIELD", "post"),
        ({"post": {"id": 77}, "update_mask": TITLE}, "INVALID_FIELD", "post.title"),
        ({"post": {"id": 77}, "update_mask": {"paths": ["*"]}}, "INVALID_FIELD", "post.title"),
        *bad_values("post.title", BAD_TITLES[1:], post={"id": 77}),
        *bad_values("post.content", BAD_CONTENTS, post={"id": 77}),
        *bad_request_ids(post={"id": 77, "title": "Notes"}),
    ],
    "DeletePost": [*bad_ids("id"), *bad_versions("version", id=77), *bad_request_ids(id=77)],
    "BulkCreatePosts": [
        *bad_streams("posts", {"author_id": 77, "title": "Notes"}),
        *bad_options("INVALID_OPTIONS", "on_conflict", {"on_conflict": 1}, {"on_conflict": 2}),
        *bad_options("INVALID_OPTIONS", "on_conflict", {"on_conflict": 2, "restore": True}),
        *bad_options("INVALID_OPTIONS", "update_mask", {"update_mask": TITLE}),
    ],
    "BulkUpdatePosts": [
        *bad_streams("posts", {"id": 77, "title": "Notes"}, update_mask=TITLE),
        *bad_options("INVALID_OPTIONS", "update_mask", {}),
        *bad_options("INVALID_OPTIONS", "on_conflict", {"on_conflict": 1, "update_mask": TITLE}),
        *bad_masks(["author_id", "author_email", "author"], path="options.update_mask"),
    ],
    "BulkDeletePosts": [
        *bad_streams("posts", {"id": 77}),
        *bad_options("INVALID_OPTIONS", "restrict", {"restrict": True}),
    ],
    "ExportPosts": bad_exports(),
    "WatchChanges": bad_feeds(),
    "ListChanges": [*bad_feeds(), *bad_values("page_size", [-1, INT32_MIN])],
}
