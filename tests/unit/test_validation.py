"""The rules that all entities share."""

from typing import Any

import pytest

from roster.errors import InvalidField, TooLarge
from roster.v1.resources_pb2 import User
from service.validation import (
    MAX_ID,
    Check,
    are_valid_texts,
    check_choice,
    check_ids,
    collect_violations,
    id_error,
    text_error,
    version_error,
)


@pytest.mark.parametrize(
    ("rule", "value"), [(id_error, 1), (id_error, MAX_ID), (version_error, 0), (version_error, 2**63 - 1)]
)
def test_accepts_ids_and_versions_up_to_their_limits(rule: Check, value: Any) -> None:
    """Both limits are valid values."""
    assert rule(value) is None


@pytest.mark.parametrize(
    ("rule", "value"), [(id_error, 0), (id_error, -1), (id_error, MAX_ID + 1), (version_error, -1)]
)
def test_rejects_ids_and_versions_out_of_range(rule: Check, value: Any) -> None:
    """The error ends a sentence that begins with the name of the field."""
    error = rule(value)

    assert error
    assert error.startswith("must be ")


@pytest.mark.parametrize("texts", [["a", "bb"], ["a", "bbb"], ["a\0"], [None, ""], []])
def test_checks_many_texts_as_it_checks_one(texts: list[str | None]) -> None:
    """Both rules agree on every list."""
    are_valid = all(text_error(text or "", 2) is None for text in texts)

    assert are_valid_texts(texts, 2) == are_valid


def test_reports_all_violations_at_once() -> None:
    """The message of the error is that of the first violation."""

    def check() -> None:
        with collect_violations() as violations:
            violations.add("a", "is wrong")
            violations.add("b", None)
            violations.add("c", "is wrong too")

    with pytest.raises(InvalidField, match="a is wrong") as caught:
        check()
    assert [violation.field for violation in caught.value.violations] == ["a", "c"]
    assert caught.value.violations[1].message == "c is wrong too"


def test_removes_duplicate_ids() -> None:
    """Each id keeps its first position."""
    assert check_ids([3, 1, 3, 2, 1]) == [3, 1, 2]
    assert len(check_ids(range(1, 1001))) == 1000


def test_reports_each_invalid_id_by_its_position() -> None:
    """The valid ids are not mentioned."""
    with pytest.raises(InvalidField) as caught:
        check_ids([1, 0, 2, MAX_ID + 1])

    assert [violation.field for violation in caught.value.violations] == ["ids[1]", "ids[3]"]


def test_accepts_1_to_1000_ids() -> None:
    """Fewer or more are refused."""
    with pytest.raises(InvalidField):
        check_ids([])
    with pytest.raises(TooLarge):
        check_ids([1] * 1001)


def test_rejects_numbers_that_an_enum_lacks() -> None:
    """The error lists the names of the enum."""
    check_choice(User.View.WITH_POSTS, User.View, "view")
    with pytest.raises(InvalidField, match="BASIC, WITH_POSTS"):
        check_choice(2, User.View, "view")
