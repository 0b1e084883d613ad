"""Posts: messages <-> values. Pure functions; all checks of a request happen here."""

from collections.abc import Collection, Sequence

from roster.v1.posts_pb2 import ListPostsRequest, UpdatePostRequest
from roster.v1.resources_pb2 import Post as PostMessage
from service.bulk.convert import add_fields, add_identity
from service.db.base import Values, column_names
from service.db.bulk.batch import Batch
from service.db.selection import Row
from service.encoding import RowEncoder
from service.errors import InvalidField
from service.posts.model import Post
from service.posts.rules import CREATE_RULES, RULES
from service.users.convert import user_to_fields
from service.users.rules import are_plain_emails, email_key_error, may_be_costly, normalise_email
from service.validation import check_id, collect_violations, id_error
from service.wire import (
    Fields,
    Update,
    row_converter,
    update_from_message,
    values_from_message,
)

WRITABLE = tuple(RULES)
POST_COLUMNS = column_names(Post)

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


def author_id_from_request(request: ListPostsRequest) -> int:
    """Return the id of the author whose posts are listed, 0 for all posts; raises InvalidField."""
    return request.author_id and check_id(request.author_id, "author_id")


def has_costly_posts(messages: Sequence[PostMessage]) -> bool:
    """Return whether some of the rows may take long to read."""
    return may_be_costly([message.author_email for message in messages])


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
    add_fields(batch, messages, fields, RULES)
    return batch


def _add_authors(batch: Batch, messages: Sequence[PostMessage]) -> None:
    ids: list[int | None] = [message.author_id or None for message in messages]
    given = [message.author_email for message in messages]
    is_plain = are_plain_emails(given)
    emails: list[str | None] = [*given]
    if not is_plain:
        emails = [normalise_email(email) or None for email in given]
    batch.add("author_id", ids, id_error, is_sound=not any(ids))
    batch.add("author_email", emails, email_key_error, is_sound=is_plain)
    if is_plain and not any(ids):
        return
    for row, (id, email) in enumerate(zip(ids, emails, strict=True)):
        if id is None and email is None:
            batch.fail(row, InvalidField("author_id or author_email is required", field="author_id"))
        elif id is not None and email is not None:
            batch.fail(
                row, InvalidField("author_email can't come together with author_id", field="author_email")
            )
