"""Posts: messages <-> values. Pure functions; all checks of a request happen here."""

from collections.abc import Collection, Sequence

from roster.errors import InvalidField
from roster.v1.posts_pb2 import CountPostsRequest, ListPostsRequest, UpdatePostRequest
from roster.v1.resources_pb2 import Post as PostMessage
from service.bulk.builder import BatchBuilder
from service.db.base import Values, column_names
from service.db.bulk.batch import Batch
from service.db.selection import Row
from service.encoding import RowEncoder
from service.posts.model import Post
from service.posts.rules import CREATE_RULES, RULES
from service.timeslice import slices
from service.users.convert import user_to_fields
from service.users.rules import are_plain_emails, email_key_error, normalise_email
from service.validation import ID_RULE, Rule, check_id, collect_violations
from service.wire import (
    Fields,
    Update,
    row_converter,
    update_from_message,
    values_from_message,
)

WRITABLE = tuple(RULES)
POST_COLUMNS = column_names(Post)
AUTHOR_EMAIL = Rule(email_key_error, are_plain_emails)

POST_ENCODER = RowEncoder(POST_COLUMNS, PostMessage)
post_to_fields = row_converter(POST_COLUMNS, PostMessage)


def post_to_message(row: Row) -> PostMessage:
    """Return a post as the API shows it."""
    return PostMessage(**post_to_fields(row))


def post_with_author_to_fields(row: Row) -> Fields:
    """Return a post and its author as the fields of a message; the author's columns follow the post's."""
    return {**post_to_fields(row), "author": user_to_fields(row[len(POST_COLUMNS) :])}


def post_from_message(message: PostMessage) -> Values:
    """Return the values of a new post; raises InvalidField."""
    with collect_violations() as violations:
        if message.author_email:
            violations.add("post.author_email", "is for bulk creation; send author_id")
        return values_from_message(message, CREATE_RULES, "post", violations)


def post_update_from_request(request: UpdatePostRequest) -> Update:
    """Return the changes to a post; raises InvalidMask, InvalidField."""
    return update_from_message(request.post, request.update_mask, RULES, "post")


def author_id_from_request(request: ListPostsRequest | CountPostsRequest) -> int:
    """Return the id of the author whose posts are asked for, 0 for all posts; raises InvalidField."""
    return request.author_id and check_id(request.author_id, "author_id")


async def post_batch_from_messages(
    messages: Sequence[PostMessage],
    fields: Collection[str],
    masked: Collection[str],  # noqa: ARG001  (no field of a post is required by being named)
) -> Batch:
    """Return the fields of rows as columns; a row that breaks a rule is in `failures`.

    A new row has its author's id or e-mail, and 0 or "" for the other.
    """
    builder = BatchBuilder(messages)
    await builder.add_identity(fields)
    if "author_id" in fields:
        await _add_authors(builder)
    await builder.add_fields(fields, RULES)
    return builder.batch


async def _add_authors(builder: BatchBuilder) -> None:
    ids, emails = builder.values_or_none("author_id"), builder.values_or_none("author_email")
    await builder.add("author_id", ids, ID_RULE)
    await builder.add("author_email", emails, AUTHOR_EMAIL, normalise=_normalise_author)
    if all(emails) and not any(ids):
        return
    async for rows in slices(range(len(ids))):
        for row in rows:
            if error := _author_error(ids[row], emails[row]):
                builder.batch.fail(row, error)


def _author_error(id: int | None, email: str | None) -> InvalidField | None:
    if id is None and email is None:
        return InvalidField("author_id or author_email is required", field="author_id")
    if id is not None and email is not None:
        return InvalidField("author_email can't come together with author_id", field="author_email")
    return None


def _normalise_author(email: str) -> str | None:
    return normalise_email(email) or None
