"""Posts: message <-> values. Pure; the rules of a post's fields are applied here."""

from collections.abc import Callable, Collection, Iterable, Sequence
from operator import attrgetter
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from roster.v1.resources_pb2 import Post as PostMessage
from service.bulk.convert import add_identity
from service.db.bulk.batch import Batch
from service.errors import InvalidField
from service.posts.model import Post
from service.users.convert import columns_of as user_columns_of, user_fields
from service.validation import (
    MAX_CONTENT_BYTES,
    MAX_TITLE,
    Violations,
    are_plain_emails,
    are_texts,
    checking,
    masked_fields,
    normalise_email,
    timestamp,
    wrong_content,
    wrong_email,
    wrong_id,
    wrong_title,
)

columns_of = attrgetter("id", "title", "content", "author_id", "created_at", "updated_at", "version")
WRITABLE = ("title", "content")
RULES: dict[str, Callable[[Any], str | None]] = {
    "author_id": wrong_id,
    "title": wrong_title,
    "content": wrong_content,
}


def post_to_message(post: Post, *, with_author: bool = False) -> PostMessage:
    """Return a stored post as the API shows it."""
    return PostMessage(**(with_author_fields(post) if with_author else post_fields(columns_of(post))))


def with_author_fields(post: Post) -> dict[str, Any]:
    """Return a stored post with its author as the fields of its message."""
    return {**post_fields(columns_of(post)), "author": user_fields(user_columns_of(post.author))}


def post_fields(row: Iterable[Any]) -> Any:
    """Return a post's columns, as a repository or a reader returns them, as the fields of its message.

    An answer makes its messages of them; to make each first and then copy it takes 1.6 times as long.
    """
    id, title, content, author_id, created_at, updated_at, version, *_ = row
    return {
        "id": id,
        "title": title,
        "content": content,
        "author_id": author_id,
        "created_at": timestamp(created_at),
        "updated_at": timestamp(updated_at),
        "version": version,
    }


def post_from_message(message: PostMessage) -> dict[str, Any]:
    """Return the values of a new post; raises InvalidField."""
    with checking() as violations:
        if message.author_email:
            violations.add("post.author_email", "is for bulk creation; send author_id")
        return _values(message, ("author_id", *WRITABLE), violations)


def post_changes_from_message(message: PostMessage, mask: FieldMask) -> dict[str, Any]:
    """Return the values that an update writes; raises InvalidMask, InvalidField."""
    fields = masked_fields(message, mask, WRITABLE)
    if not fields:
        raise InvalidField("post has nothing to change; set title or content", field="post")
    with checking() as violations:
        return _values(message, fields, violations)


def post_batch_from_messages(
    messages: Sequence[PostMessage],
    fields: Collection[str],
    masked: Collection[str],  # noqa: ARG001  (no field of a post is required by being named)
) -> Batch:
    """Return the fields of rows as columns; a row that breaks a rule is in `failures`.

    A new row has its author's id or e-mail, and 0 or "" for the other.
    """
    batch = Batch(len(messages))
    add_identity(batch, messages, fields)
    if "author_id" in fields:
        _add_authors(batch, messages)
    if "title" in fields:
        titles = [message.title for message in messages]
        batch.add("title", titles, wrong_title, is_sound="" not in titles and are_texts(titles, MAX_TITLE))
    if "content" in fields:
        contents = [message.content for message in messages]
        # A character has at most 4 bytes.
        batch.add("content", contents, wrong_content, is_sound=are_texts(contents, MAX_CONTENT_BYTES // 4))
    return batch


def _add_authors(batch: Batch, messages: Sequence[PostMessage]) -> None:
    ids: list[int | None] = [message.author_id or None for message in messages]
    given = [message.author_email for message in messages]
    is_plain = are_plain_emails(given)
    emails = given if is_plain else [normalise_email(email) or None for email in given]
    batch.add("author_id", ids, wrong_id, is_sound=not any(ids))
    batch.add("author_email", emails, wrong_email, is_sound=is_plain)
    if is_plain and not any(ids):
        return
    for row, (id, email) in enumerate(zip(ids, emails, strict=True)):
        if id is None and email is None:
            batch.fail(row, InvalidField("author_id or author_email is required", field="author_id"))
        elif id is not None and email is not None:
            batch.fail(
                row, InvalidField("author_email can't come together with author_id", field="author_email")
            )


def _values(message: PostMessage, fields: Sequence[str], violations: Violations) -> dict[str, Any]:
    values = {field: getattr(message, field) for field in fields}
    for field, value in values.items():
        violations.add(f"post.{field}", RULES[field](value))
    return values
