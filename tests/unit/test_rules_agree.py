"""The rules in the protos, as protovalidate reads them, and Roster's own checks of requests agree."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from random import Random
from typing import Any

import pytest
from google.api.field_behavior_pb2 import OUTPUT_ONLY, field_behavior
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from protovalidate import Validator

from roster.v1.bulk_pb2 import BulkOptions
from service.services import RPCS
from service.users.rules import MAX_EMAIL, normalise_email
from tests.support.checks import CHECKS, VALID, is_refused
from tests.support.field_values import HASH, values

RULES = 1159  # the number of the options that have the rules of protovalidate
VALUES = 1000
VALIDATOR = Validator()
WRITABLE = {"email", "full_name", "hashed_password", "title", "content"}  # by a bulk update

# Valid values of the fields of the messages in requests; random messages have some of them.
FILLINGS: dict[str, dict[str, Any]] = {
    "User": {"id": 7, "email": "ada@example.org", "full_name": "Ada", "is_active": True, "version": 3}
    | {"password": "secret", "hashed_password": HASH},
    "Post": {
        "id": 7,
        "title": "Notes",
        "content": "",
        "author_id": 7,
        "version": 3,
        "author_email": "a@b.org",
    },
    "UserKey": {"id": 7, "email": "ada@example.org", "version": 3},
    "PostKey": {"id": 7, "version": 3},
    "BulkOptions": {"load_id": "staff", "on_conflict": 2, "atomicity": 1, "validate_only": True}
    | {"return_ids": True, "update_mask": {"paths": ["full_name"]}, "max_failures": 3, "restore": True}
    | {"on_missing": 1, "caller": "jwt:ada", "restrict": True},
}


@dataclass(frozen=True)
class Field:
    """A field of a request, and the path to it; rows are in lists of one."""

    request: type[Message]
    path: tuple[FieldDescriptor, ...]

    def __str__(self) -> str:
        return ".".join([self.request.DESCRIPTOR.name, *(field.name for field in self.path)])

    @property
    def last(self) -> FieldDescriptor:
        return self.path[-1]

    def with_value(self, value: Any) -> Any:
        """Return a request that is valid but for the value."""
        request: Any = self.request(**VALID[self.request])
        if (
            self.path[0].is_repeated
            and self.last.name in WRITABLE
            and request.options.HasField("update_mask")
        ):
            request.options.update_mask.paths[:] = [self.last.name]
        if str(self) == "CreateUserRequest.update_mask":
            request.on_conflict = BulkOptions.UPDATE
        message = request
        for step in self.path[:-1]:
            message = getattr(message, step.name)
            if step.is_repeated:
                message = message[0]
        if self.last.name == "author_email":  # instead of an id
            message.ClearField("author_id")
        _set(message, self.last, value)
        return request


def _set(message: Any, field: FieldDescriptor, value: Any) -> None:
    if field.is_repeated:
        message.ClearField(field.name)
        getattr(message, field.name).extend(value)
    elif field.message_type is not None:
        getattr(message, field.name).CopyFrom(value)
    else:
        setattr(message, field.name, value)


def fields_with_rules() -> Iterator[Field]:
    """Yield each field with rules of each request, those of its messages included."""
    for request in CHECKS:
        for path in _paths(request.DESCRIPTOR, ()):
            yield Field(request, path)


def _paths(message: Any, above: tuple[FieldDescriptor, ...]) -> Iterator[tuple[FieldDescriptor, ...]]:
    for last in message.fields:
        path = (*above, last)
        if OUTPUT_ONLY in last.GetOptions().Extensions[field_behavior]:
            continue
        if _has_rules(last) or (last.message_type and _has_rules(last.message_type)):
            yield path
        if last.message_type and last.message_type.name in FILLINGS:
            yield from _paths(last.message_type, path)


@cache
def _has_rules(described: FieldDescriptor | Descriptor) -> bool:
    options: Any = UnknownFieldSet(described.GetOptions())
    return any(option.field_number == RULES for option in options)


def _always(value: Any) -> bool:
    return True


@dataclass(frozen=True)
class Disagreement:
    """Values on which the rules and the server disagree, and why."""

    fields: str  # names that end so, separated by spaces
    refused_by: str
    reason: str
    holds: Callable[[Any], bool] = _always

    def covers(self, asked: Field, refused_by: str, value: Any) -> bool:
        names = tuple(self.fields.split())
        return self.refused_by == refused_by and str(asked).endswith(names) and self.holds(value)


def _is_trimmed_further(email: str) -> bool:
    """Return whether the server trims white space that the pattern does not know: it is not in ASCII."""
    return email.strip(" \t\n\f\r") != email.strip()


def _is_shortened(email: str) -> bool:
    return len(email) > MAX_EMAIL >= len(normalise_email(email))


def _is_another_spelling(request_id: str) -> bool:
    hyphens = [position for position, character in enumerate(request_id) if character == "-"]
    return hyphens != [8, 13, 18, 23] or len(request_id) != 36 or not request_id.isascii()


STREAMS = "BulkCreateUsersRequest BulkUpdateUsersRequest BulkDeleteUsersRequest"
STREAMS += " BulkCreatePostsRequest BulkUpdatePostsRequest BulkDeletePostsRequest"


def in_streams(*names: str) -> str:
    return " ".join(f"{stream}.{name}" for stream in STREAMS.split() for name in names)


DISAGREEMENTS = [
    # The server refuses more: a rule can't say it, or would be as long as the code.
    Disagreement(
        ".email .author_email", "server", "domains, scripts, invisible and special characters: docs/emails.md"
    ),
    Disagreement(".hashed_password", "server", "forms and costs of hashes: docs/security.md"),
    Disagreement(".filter", "server", "the language of filters has a grammar, and fields have types"),
    Disagreement(
        ".load_id",
        "server",
        "a regular expression has no class of unassigned characters",
        lambda value: not value.isprintable(),
    ),
    Disagreement("UpdateUserRequest.user UpdatePostRequest.post", "server", "no writable field is set"),
    Disagreement(
        "UpdatePostRequest.post.title", "server", "nothing is left to change", lambda value: not value
    ),
    Disagreement(
        "BulkUpdatePostsRequest.posts", "server", "the mask names a field that the row leaves unset"
    ),
    Disagreement(
        in_streams("users.email", "users.hashed_password", "posts.title", "users.password"),
        "server",
        "the mask names a field that the row leaves unset",
        lambda value: not value,
    ),
    Disagreement(
        in_streams("options", "options.on_conflict", "options.update_mask", "options.on_missing"),
        "server",
        "which options are allowed depends on the operation and on each other: docs/bulk-loading.md",
    ),
    Disagreement(
        "UserRequest.update_mask PostRequest.update_mask",
        "server",
        "`*` comes alone, there are at most 100 paths, and a path may name a field that is unset",
    ),
    # The rules refuse more.
    Disagreement(
        ".email .author_email", "rules", "the server normalises first, which shortens", _is_shortened
    ),
    Disagreement(".email .author_email", "rules", "the server trims any white space", _is_trimmed_further),
    Disagreement(
        ".author_email", "rules", "white space alone counts as unset", lambda value: not value.strip()
    ),
    Disagreement(".order_by", "rules", "the server splits at any white space"),
    Disagreement(
        ".request_id",
        "rules",
        "the server also reads UUIDs without hyphens, in braces and as URNs",
        _is_another_spelling,
    ),
    Disagreement(
        "CreateUserRequest.user.id CreateUserRequest.user.version BulkCreateUsersRequest.users.id"
        " BulkCreateUsersRequest.users.version CreatePostRequest.post.id CreatePostRequest.post.version"
        " BulkCreatePostsRequest.posts.id BulkCreatePostsRequest.posts.version",
        "rules",
        "a create ignores it",
    ),
    Disagreement(
        "UpdatePostRequest.post.author_id UpdatePostRequest.post.author_email"
        " BulkUpdatePostsRequest.posts.author_id BulkUpdatePostsRequest.posts.author_email",
        "rules",
        "an update ignores it",
    ),
    Disagreement(
        ".offset",
        "rules",
        "the stream checks it when it places the message: tests/e2e/test_bad_bulk_input.py",
        lambda value: value < 0,
    ),
]


class Comparison:
    """The number of questions, and the answers that differ."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()  # by the name of a field in its message
        self.seen: set[int] = set()  # positions in DISAGREEMENTS
        self.unlisted: list[str] = []

    def note(self, asked: Field, refused_by: str, value: Any) -> None:
        covering = [
            position
            for position, listed in enumerate(DISAGREEMENTS)
            if listed.covers(asked, refused_by, value)
        ]
        self.seen.update(covering)
        if not covering:
            self.unlisted.append(f"{asked}: refused by {refused_by}: {str(value)[:200]!r}")


@pytest.fixture(scope="module")
async def comparison() -> Comparison:
    """The answers to some values of each field; a field of several requests is asked in all of them."""
    found, fields = Comparison(), list(fields_with_rules())
    requests = Counter(asked.last.full_name for asked in fields)
    for asked in fields:
        number = ceil(VALUES / requests[asked.last.full_name])
        for value in values(asked.last, FILLINGS, Random(str(asked)), number):
            request = asked.with_value(value)
            by_server, by_rules = await is_refused(request), bool(VALIDATOR.collect_violations(request))
            found.asked[asked.last.full_name] += 1
            if by_server is not by_rules:
                found.note(asked, "server" if by_server else "rules", value)
    return found


@pytest.mark.parametrize("request_type", CHECKS, ids=lambda request: request.DESCRIPTOR.name)
async def test_both_accept_a_valid_request(request_type: type[Message]) -> None:
    """The other tests change one value of it."""
    request = request_type(**VALID[request_type])
    assert not await is_refused(request)
    assert VALIDATOR.collect_violations(request) == []


def test_every_request_of_the_contract_is_asked() -> None:
    """Those of all services."""
    assert {request.DESCRIPTOR for request in CHECKS} == {method.input_type for method in RPCS.values()}


async def test_every_field_with_rules_is_asked(comparison: Comparison) -> None:
    """At least a thousand values each."""
    assert min(comparison.asked.values()) >= VALUES


async def test_rules_and_checks_agree(comparison: Comparison) -> None:
    """Apart from the disagreements that are listed here."""
    assert comparison.unlisted == []


async def test_listed_disagreements_occur(comparison: Comparison) -> None:
    """One that no longer does is to be removed from the list."""
    unseen = [listed for number, listed in enumerate(DISAGREEMENTS) if number not in comparison.seen]
    assert unseen == []
