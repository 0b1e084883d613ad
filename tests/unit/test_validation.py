"""The rules of single fields."""

import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings, strategies as st

from roster.v1.resources_pb2 import Post, User
from service import validation as fields
from service.db.base import MAX_ID
from service.errors import InvalidField, InvalidMask, TooLarge

MIB = 1 << 20
WRITABLE = ("email", "full_name", "is_active")
REQUEST_ID = "7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10"

texts = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(email=texts)
def test_a_normalised_email_stays_as_it_is(email: str) -> None:
    """Once is enough."""
    once = fields.normalise_email(email)

    assert fields.normalise_email(once) == once


@settings(deadline=None)
@given(email=texts)
def test_all_spellings_of_an_email_have_one_normal_form(email: str) -> None:
    """Composed or decomposed, with spaces around it or without."""
    composed, decomposed = (unicodedata.normalize(form, email) for form in ("NFC", "NFD"))

    assert fields.normalise_email(f"\n {decomposed}\t") == fields.normalise_email(composed)


@pytest.mark.parametrize("email", ["Ada@Example.ORG", " ada@example.org\n", "\u00a0ADA@EXAMPLE.ORG\u3000"])
def test_an_email_is_trimmed_and_lower_case(email: str) -> None:
    """In its name as well as in its domain."""
    assert fields.normalise_email(email) == "ada@example.org"


def test_an_email_is_composed() -> None:
    """A letter and its accent become one character."""
    assert fields.normalise_email("e\u0301va@example.org") == "\u00e9va@example.org"


GOOD: list[tuple[Callable[[Any], str | None], Any]] = [
    (fields.wrong_email, "a@b"),
    (fields.wrong_email, "o'brien+tag@exa-mple.org"),
    (fields.wrong_email, "é@例え.jp"),
    (fields.wrong_email, "a" * 253 + "@b"),
    (fields.wrong_full_name, ""),
    (fields.wrong_full_name, "\n😀" * 127),
    (fields.wrong_title, "x"),
    (fields.wrong_title, "😀" * 255),
    (fields.wrong_content, ""),
    (fields.wrong_content, "x" * MIB),
    (fields.wrong_content, "é" * (MIB // 2)),
    (fields.wrong_password, " "),
    (fields.wrong_password, "😀" * 1024),
    (fields.wrong_id, 1),
    (fields.wrong_id, MAX_ID),
    (fields.wrong_version, 0),
    (fields.wrong_version, 2**63 - 1),
]

WRONG: list[tuple[Callable[[Any], str | None], Any]] = [
    *(
        (fields.wrong_email, email)
        for email in (
            "",
            "@",
            "ada",
            "@example.org",
            "ada@",
            "ada@home@example.org",
            "ada @example.org",
            "ada@example\u3000.org",
            "ada\0@example.org",
            "a" * 254 + "@b",
        )
    ),
    (fields.wrong_full_name, "x" * 256),
    (fields.wrong_full_name, "A\0da"),
    (fields.wrong_title, ""),
    (fields.wrong_title, "x" * 256),
    (fields.wrong_title, "\0"),
    (fields.wrong_content, "x" * (MIB + 1)),
    (fields.wrong_content, "é" * (MIB // 2) + "x"),
    (fields.wrong_content, "\0"),
    (fields.wrong_password, ""),
    (fields.wrong_password, "x" * 1025),
    (fields.wrong_password, "pass\0word"),
    (fields.wrong_id, 0),
    (fields.wrong_id, -1),
    (fields.wrong_id, MAX_ID + 1),
    (fields.wrong_version, -1),
]


@pytest.mark.parametrize(("rule", "value"), GOOD)
def test_a_good_value_is_accepted(rule: Callable[[Any], str | None], value: Any) -> None:
    """Up to the very bound."""
    assert rule(value) is None


@pytest.mark.parametrize(("rule", "value"), WRONG)
def test_a_wrong_value_is_explained_and_not_repeated(rule: Callable[[Any], str | None], value: Any) -> None:
    """By the end of a sentence that begins with the field's name."""
    wrong = rule(value)

    assert wrong
    assert wrong.startswith(("is ", "must "))
    assert not isinstance(value, str) or len(value) < 3 or value not in wrong


def test_everything_wrong_is_told_at_once() -> None:
    """The first violation is the error's message."""

    def check() -> None:
        with fields.checking() as violations:
            violations.add("a", "is wrong")
            violations.add("b", None)
            violations.add("c", "is wrong too")

    with pytest.raises(InvalidField, match="a is wrong") as caught:
        check()
    assert [violation.field for violation in caught.value.violations] == ["a", "c"]
    assert caught.value.violations[1].message == "c is wrong too"


def test_ids_are_asked_for_once_each_in_their_first_place() -> None:
    """A repeated id is left out."""
    assert fields.check_ids([3, 1, 3, 2, 1]) == [3, 1, 2]
    assert len(fields.check_ids(range(1, 1001))) == 1000


def test_ids_are_checked_one_by_one() -> None:
    """The path of a wrong one has its place."""
    with pytest.raises(InvalidField) as caught:
        fields.check_ids([1, 0, 2, MAX_ID + 1])

    assert [violation.field for violation in caught.value.violations] == ["ids[1]", "ids[3]"]


def test_a_batch_has_1_to_1000_ids() -> None:
    """Fewer or more are refused."""
    with pytest.raises(InvalidField):
        fields.check_ids([])
    with pytest.raises(TooLarge):
        fields.check_ids([1] * 1001)


def test_a_request_id_is_a_uuid_or_absent() -> None:
    """In whatever case it is written."""
    written = fields.check_request_id(REQUEST_ID)

    assert str(written) == REQUEST_ID
    assert fields.check_request_id(REQUEST_ID.upper()) == written
    assert fields.check_request_id("") is None
    with pytest.raises(InvalidField, match="must be a UUID"):
        fields.check_request_id("once")


def test_a_field_is_set_where_it_was_given() -> None:
    """An empty text is given where the field has presence, and not given where it has none."""
    user = User(email="", full_name="", is_active=False)

    assert [fields.is_set(user, field) for field in WRITABLE] == [False, True, True]
    assert [fields.is_set(User(email="a@b"), field) for field in WRITABLE] == [True, False, False]
    assert fields.is_set(Post(content=""), "content")


def test_without_a_mask_an_update_writes_what_is_set() -> None:
    """Nothing else."""
    assert fields.masked_fields(User(is_active=False), FieldMask(), WRITABLE) == ["is_active"]
    assert fields.masked_fields(User(), FieldMask(), WRITABLE) == []


def test_with_a_mask_an_update_writes_what_it_names() -> None:
    """Set or not, each once; `*` is every field."""
    user = User(email="ada@example.org")

    mask = FieldMask(paths=["full_name", "email", "full_name"])
    assert fields.masked_fields(user, mask, WRITABLE) == ["full_name", "email"]
    assert fields.masked_fields(user, FieldMask(paths=["*"]), WRITABLE) == list(WRITABLE)


@pytest.mark.parametrize(
    "paths", [["id"], ["email", "posts"], ["posts.title"], [""], ["*", "email"], ["nme"]]
)
def test_a_mask_names_nothing_that_can_t_be_written(paths: list[str]) -> None:
    """The error says what it may name."""
    with pytest.raises(InvalidMask, match="it may name email, full_name, is_active"):
        fields.mask_paths(FieldMask(paths=paths), WRITABLE)


@settings(deadline=None)
@given(moment=st.datetimes(timezones=st.just(UTC)))
def test_a_time_is_the_same_as_a_timestamp(moment: datetime) -> None:
    """To the microsecond, in all years from 1 to 9999."""
    assert Timestamp(**fields.timestamp(moment)).ToDatetime(UTC) == moment


@pytest.mark.parametrize(("batch_size", "rows"), [(0, 1000), (1, 1), (1000, 1000)])
def test_an_export_has_1000_rows_a_message_unless_told_otherwise(batch_size: int, rows: int) -> None:
    """From 1 to 1000."""
    assert fields.check_export(0, batch_size) == rows


def test_an_export_s_numbers_are_checked_together() -> None:
    """Both are told."""
    with pytest.raises(InvalidField) as caught:
        fields.check_export(-1, 1001)

    assert [violation.field for violation in caught.value.violations] == ["after_id", "batch_size"]


def test_a_choice_is_one_of_the_enum() -> None:
    """Another number is refused, and the error names the choices."""
    fields.check_choice(User.View.WITH_POSTS, User.View, "view")
    with pytest.raises(InvalidField, match="BASIC, WITH_POSTS"):
        fields.check_choice(2, User.View, "view")
