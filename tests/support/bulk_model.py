"""A model of the bulk streams in plain Python: rows are applied one after the other."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from google.rpc.code_pb2 import Code

from roster.v1.bulk_pb2 import BulkAck, BulkOptions, RowFailure
from roster.v1.posts_pb2 import PostKey
from roster.v1.resources_pb2 import Post, User
from roster.v1.users_pb2 import UserKey
from service.bulk.operation import Operation
from service.posts.servicer import CREATE_POSTS, DELETE_POSTS, UPDATE_POSTS
from service.users.servicer import CREATE_USERS, DELETE_USERS, UPDATE_USERS
from tests.support.items import CREATE_ITEMS, UPDATE_ITEMS

Values = dict[str, Any]
Tables = dict[str, dict[int, Values]]
Write = Callable[[Tables, Any, BulkOptions], tuple[str, int]]

ADA, BOB, CYD = 1_000_001, 1_000_002, 1_000_003
HASHES = [f"$argon2id$v=19$m=8,t=1,p=1$c29tZXNhbHQ${letter * 22}" for letter in "AB"]

# The e-mail sent -> the e-mail stored.
EMAILS = {
    "ada@example.org": "ada@example.org",
    " ADA@Example.org\n": "ada@example.org",
    "bob@example.org": "bob@example.org",
    "cyd@example.org": "cyd@example.org",
    "dan@example.org": "dan@example.org",
    "Dan@EXAMPLE.org": "dan@example.org",
    "e\u0301@example.org": "\u00e9@example.org",
    "\u00c9@example.org": "\u00e9@example.org",
}
BAD: Mapping[str, Sequence[Any]] = {
    "id": [0, -1, 2**53 + 1],
    "version": [-1],
    "email": ["", "nobody", "a b@example.org", "a@b@c", "nul\0@example.org", f"{'x' * 250}@example.org"],
    "full_name": ["x" * 256, "nul\0"],
    "hashed_password": ["open sesame", "$2b$12$abcdefghijklmnopqrstuv"],
    "password": ["open sesame"],
    "title": ["", "x" * 256, "nul\0"],
    "content": ["nul\0"],
    "author_id": [-1, 2**53 + 1],
    "author_email": ["nobody"],
    "slug": [""],
}
CODES = {
    "INVALID_FIELD": Code.INVALID_ARGUMENT,
    "EMAIL_TAKEN": Code.ALREADY_EXISTS,
    "USER_NOT_FOUND": Code.NOT_FOUND,
    "POST_NOT_FOUND": Code.NOT_FOUND,
    "AUTHOR_NOT_FOUND": Code.FAILED_PRECONDITION,
    "VERSION_MISMATCH": Code.ABORTED,
    "ID_TAKEN": Code.ALREADY_EXISTS,
    "SLUG_TAKEN": Code.ALREADY_EXISTS,
    "CODE_TAKEN": Code.ALREADY_EXISTS,
    "ITEM_NOT_FOUND": Code.NOT_FOUND,
    "USER_HAS_POSTS": Code.FAILED_PRECONDITION,
}


@dataclass(frozen=True)
class Kind:
    """One of the bulk RPCs, and its effect on one row."""

    operation: Operation
    write: Write


@dataclass(frozen=True)
class Load:
    """A load of one of KINDS, cut into messages."""

    kind: str
    options: BulkOptions
    batches: list[list[Any]]

    @property
    def operation(self) -> Operation:
        """Return the operation of the stream."""
        return KINDS[self.kind].operation

    def requests(self) -> Iterable[Any]:
        """Return the messages of the stream."""
        for number, rows in enumerate(self.batches):
            options = self.options if number == 0 else None
            yield self.operation.request(options=options, **{self.operation.rows_field: rows})


def initial_tables() -> Tables:
    """Return the contents of the database before a load."""
    users = {
        ADA: _user("ada@example.org", "Ada", HASHES[0], version=1),
        BOB: _user("bob@example.org", None, None, version=2),
        CYD: _user("cyd@example.org", "", None, version=1),
    }
    posts = {
        ADA: {"author_id": ADA, "title": "Notes", "content": "", "version": 1},
        BOB: {"author_id": ADA, "title": "More", "content": "\U0001d49c", "version": 2},
        CYD: {"author_id": BOB, "title": "Last", "content": "...", "version": 1},
    }
    items: dict[int, Values] = {
        ADA: {"slug": "a", "code": 1, "times": 7, "expected": "first", "version": 1},
        BOB: {"slug": "b", "code": 2, "times": 0, "expected": "", "version": 2},
        CYD: {"slug": "c", "code": None, "times": 0, "expected": "", "version": 1},
    }
    return {"users": users, "posts": posts, "items": items}


def apply_load(tables: Tables, load: Load) -> tuple[list[BulkAck], Tables]:
    """Return the acks of a load and the tables after it; new rows have the ids -1, -2, …"""
    acks: list[BulkAck] = []
    offset = 0
    for rows in load.batches:
        ack, tables = _applied_batch(tables, load, offset, rows)
        acks.append(ack)
        offset += len(rows)
    return acks, tables


def _applied_batch(tables: Tables, load: Load, offset: int, rows: list[Any]) -> tuple[BulkAck, Tables]:
    after = deepcopy(tables)
    ack = BulkAck(offset=offset, next_offset=offset + len(rows))
    for position, row in enumerate(rows, offset):
        posts = len(after["posts"])
        try:
            what, id = KINDS[load.kind].write(after, row, load.options)
        except Refused as refused:
            what, id = "failed", 0
            ack.failures.append(refused.to_message(position))
        setattr(ack, what, getattr(ack, what) + 1)
        ack.ids.append(id)
        if what == "deleted" and isinstance(row, UserKey):
            ack.deleted_posts += posts - len(after["posts"])
    known = {0, *tables[load.operation.rows_field]}
    if load.options.atomicity == BulkOptions.BATCH and ack.failures:
        failed = BulkAck(offset=offset, next_offset=ack.next_offset, failed=len(rows), ids=[0] * len(rows))
        failed.failures.extend(ack.failures)
        return _with_ids(known, failed), tables
    if load.options.validate_only:
        return _with_ids(known, ack), tables
    return ack, after


def _with_ids(known: Collection[int], ack: BulkAck) -> BulkAck:
    """Remove from an ack the ids of rows that the batch did not create after all."""
    ack.ids[:] = [id if id in known else 0 for id in ack.ids]
    for failure in ack.failures:
        failure.existing_id = failure.existing_id if failure.existing_id in known else 0
    return ack


class Refused(Exception):
    """The reason for which a row fails."""

    def __init__(self, reason: str, field: str = "", existing_id: int = 0) -> None:
        super().__init__(reason)
        self.reason, self.field, self.existing_id = reason, field, existing_id

    def to_message(self, offset: int) -> RowFailure:
        """Return the failure of the row at an offset, without a message."""
        code, reason = CODES[self.reason], self.reason
        return RowFailure(
            offset=offset, code=code, reason=reason, field=self.field, existing_id=self.existing_id
        )


def _create_user(tables: Tables, row: User, options: BulkOptions) -> tuple[str, int]:
    mask = options.update_mask.paths
    _check(row, ["email", "full_name", "is_active", "hashed_password", "password"], required=mask)
    users, email = tables["users"], EMAILS[row.email]
    owner = _owner(users, email)
    if owner is None:
        id = min(0, *users) - 1
        is_active = row.is_active if row.HasField("is_active") else True
        users[id] = {**_user(email, _name(row), row.hashed_password or None), "is_active": is_active}
        return "created", id
    if options.on_conflict == BulkOptions.FAIL:
        raise Refused("EMAIL_TAKEN", "email", owner)
    if options.on_conflict == BulkOptions.SKIP:
        return "skipped", owner
    _change(users[owner], row, mask)
    return "updated", owner


def _update_user(tables: Tables, row: User, options: BulkOptions) -> tuple[str, int]:
    mask = options.update_mask.paths
    fields = [name for name in ("email", "full_name", "is_active", "hashed_password") if name in mask]
    _check(row, ["id", "version", *fields, "password"], required=mask)
    user = _current(tables["users"], row, "USER_NOT_FOUND")
    owner = _owner(tables["users"], EMAILS[row.email]) if "email" in mask else None
    if owner not in (None, row.id):
        raise Refused("EMAIL_TAKEN", "email", owner or 0)
    _change(user, row, mask)
    return "updated", row.id


def _create_post(tables: Tables, row: Post, options: BulkOptions) -> tuple[str, int]:
    _check(row, ["author_id", "author_email"])
    if bool(row.author_id) == bool(row.author_email):
        raise Refused("INVALID_FIELD", "author_email" if row.author_id else "author_id")
    _check(row, ["title", "content"])
    author = row.author_id or _owner(tables["users"], EMAILS[row.author_email])
    if author not in tables["users"]:
        raise Refused("AUTHOR_NOT_FOUND", "author_id" if row.author_id else "author_email")
    id = min(0, *tables["posts"]) - 1
    tables["posts"][id] = {"author_id": author, "title": row.title, "content": row.content, "version": 1}
    return "created", id


def _update_post(tables: Tables, row: Post, options: BulkOptions) -> tuple[str, int]:
    mask = options.update_mask.paths
    _check(row, ["id", "version", *(name for name in ("title", "content") if name in mask)])
    _change(_current(tables["posts"], row, "POST_NOT_FOUND"), row, mask)
    return "updated", row.id


def _delete_user(tables: Tables, row: UserKey, options: BulkOptions) -> tuple[str, int]:
    key = row.WhichOneof("key")
    if key is None:
        raise Refused("INVALID_FIELD", "id")
    _check(row, [key, "version"])
    users, posts = tables["users"], tables["posts"]
    id = row.id if key == "id" else _owner(users, EMAILS[row.email])
    if id not in users:
        return _missing("USER_NOT_FOUND", options)
    if row.version not in (0, users[id]["version"]):
        raise Refused("VERSION_MISMATCH", "version")
    theirs = [post for post, values in posts.items() if values["author_id"] == id]
    if theirs and options.restrict:
        raise Refused("USER_HAS_POSTS")
    for post in theirs:
        del posts[post]
    del users[id]
    return "deleted", id


def _delete_post(tables: Tables, row: PostKey, options: BulkOptions) -> tuple[str, int]:
    _check(row, ["id", "version"])
    if row.id not in tables["posts"]:
        return _missing("POST_NOT_FOUND", options)
    if row.version not in (0, tables["posts"][row.id]["version"]):
        raise Refused("VERSION_MISMATCH", "version")
    del tables["posts"][row.id]
    return "deleted", row.id


def _missing(reason: str, options: BulkOptions) -> tuple[str, int]:
    if options.on_missing == BulkOptions.SKIP_MISSING:
        return "skipped", 0
    raise Refused(reason)


def _create_item(tables: Tables, row: Any, options: BulkOptions) -> tuple[str, int]:
    _check(row, ["slug"])
    items, id = tables["items"], row.id or min(0, *tables["items"]) - 1
    values = {"slug": row.slug, "code": row.code or None, "times": row.times, "expected": row.expected}
    conflict = _item_conflict(items, values)
    if options.restore and row.id in items:
        conflict = Refused("ID_TAKEN", "id", row.id)
    if conflict is None:
        items[id] = {**values, "version": row.version or 1}
        return "created", id
    if options.on_conflict == BulkOptions.FAIL:
        raise conflict
    if options.on_conflict == BulkOptions.SKIP:
        return "skipped", conflict.existing_id
    _change_item(items[conflict.existing_id], row, options.update_mask.paths)
    return "updated", conflict.existing_id


def _update_item(tables: Tables, row: Any, options: BulkOptions) -> tuple[str, int]:
    mask = options.update_mask.paths
    _check(row, ["id", "version", *(name for name in ("slug",) if name in mask)])
    item = _current(tables["items"], row, "ITEM_NOT_FOUND")
    wanted = {"slug": row.slug, "code": row.code or None}
    others = {id: values for id, values in tables["items"].items() if id != row.id}
    conflict = _item_conflict(others, {name: value for name, value in wanted.items() if name in mask})
    if conflict:
        raise conflict
    _change_item(item, row, mask)
    return "updated", row.id


def _item_conflict(items: dict[int, Values], wanted: Values) -> "Refused | None":
    """Return the conflict of an item's unique values, of the slug first."""
    for name in ("slug", "code"):
        for id, values in items.items():
            if wanted.get(name) is not None and values[name] == wanted[name]:
                return Refused(f"{name.upper()}_TAKEN", name, id)
    return None


def _change_item(values: Values, row: Any, mask: Iterable[str]) -> None:
    for name in mask:
        values[name] = (row.code or None) if name == "code" else getattr(row, name)
    values["version"] += 1


def _check(row: Any, fields: Sequence[str], required: Sequence[str] = ()) -> None:
    for field in fields:
        value = getattr(row, field)
        is_given = bool(value) or (field == "is_active" and row.HasField(field))
        is_missing = field in required and field != "full_name" and not is_given
        must_be_given = field in ("id", "email", "title", "slug")
        if is_missing or (value in BAD.get(field, ()) and (is_given or must_be_given)):
            raise Refused("INVALID_FIELD", field)


def _current(table: dict[int, Values], row: Any, missing: str) -> Values:
    if row.id not in table:
        raise Refused(missing)
    if row.version not in (0, table[row.id]["version"]):
        raise Refused("VERSION_MISMATCH", "version")
    return table[row.id]


def _change(values: Values, row: Any, mask: Iterable[str]) -> None:
    for name in mask:
        values[name] = _name(row) if name == "full_name" else getattr(row, name)
        if name == "email":
            values[name] = EMAILS[row.email]
    values["version"] += 1


def _owner(users: dict[int, Values], email: str) -> int | None:
    return next((id for id, user in users.items() if user["email"] == email), None)


def _name(row: User) -> str | None:
    return row.full_name if row.HasField("full_name") else None


def _user(email: str, full_name: str | None, hashed_password: str | None, version: int = 1) -> Values:
    user = {"email": email, "full_name": full_name, "hashed_password": hashed_password}
    return {**user, "is_active": True, "version": version}


KINDS = {
    "create users": Kind(CREATE_USERS, _create_user),
    "update users": Kind(UPDATE_USERS, _update_user),
    "create posts": Kind(CREATE_POSTS, _create_post),
    "update posts": Kind(UPDATE_POSTS, _update_post),
    "delete users": Kind(DELETE_USERS, _delete_user),
    "delete posts": Kind(DELETE_POSTS, _delete_post),
    "create items": Kind(CREATE_ITEMS, _create_item),
    "update items": Kind(UPDATE_ITEMS, _update_item),
}
