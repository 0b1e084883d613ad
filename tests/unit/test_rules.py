"""The rules of the fields of users and posts."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from service.posts.rules import content_error, title_error
from service.users.rules import RULES, email_error, normalise_email, password_error
from service.validation import Rule

MIB = 1 << 20

texts = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None)
@given(email=texts)
def test_normalising_an_email_twice_changes_nothing(email: str) -> None:
    """The normal form is its own normal form."""
    normalised = normalise_email(email)

    assert normalise_email(normalised) == normalised


@settings(deadline=None)
@given(email=texts)
def test_all_spellings_of_an_email_have_one_normal_form(email: str) -> None:
    """Composed or decomposed, with spaces around it or without."""
    composed, decomposed = (unicodedata.normalize(form, email) for form in ("NFC", "NFD"))

    assert normalise_email(f"\n {decomposed}\t") == normalise_email(composed)


@pytest.mark.parametrize("email", ["Ada@Example.ORG", " ada@example.org\n", "\u00a0ADA@EXAMPLE.ORG\u3000"])
def test_normalised_email_is_trimmed_and_lower_case(email: str) -> None:
    """In its name as well as in its domain."""
    assert normalise_email(email) == "ada@example.org"


def test_normalised_email_is_composed() -> None:
    """A letter and its accent become one character."""
    assert normalise_email("e\u0301va@example.org") == "\u00e9va@example.org"


VALID: list[tuple[Rule, Any]] = [
    (email_error, "a@b"),
    (email_error, "o'brien+tag@exa-mple.org"),
    (email_error, "é@例え.jp"),
    (email_error, "a" * 253 + "@b"),
    (RULES["full_name"], ""),
    (RULES["full_name"], "\n😀" * 127),
    (title_error, "x"),
    (title_error, "😀" * 255),
    (content_error, ""),
    (content_error, "x" * MIB),
    (content_error, "é" * (MIB // 2)),
    (password_error, " "),
    (password_error, "😀" * 1024),
]

INVALID: list[tuple[Rule, Any]] = [
    (email_error, ""),
    (email_error, "@"),
    (email_error, "ada"),
    (email_error, "@example.org"),
    (email_error, "ada@"),
    (email_error, "ada@home@example.org"),
    (email_error, "ada @example.org"),
    (email_error, "ada@example\u3000.org"),
    (email_error, "ada\0@example.org"),
    (email_error, "a" * 254 + "@b"),
    (RULES["full_name"], "x" * 256),
    (RULES["full_name"], "A\0da"),
    (title_error, ""),
    (title_error, "x" * 256),
    (title_error, "\0"),
    (content_error, "x" * (MIB + 1)),
    (content_error, "é" * (MIB // 2) + "x"),
    (content_error, "\0"),
    (password_error, ""),
    (password_error, "x" * 1025),
    (password_error, "pass\0word"),
]


@pytest.mark.parametrize(("rule", "value"), VALID)
def test_accepts_valid_values(rule: Rule, value: Any) -> None:
    """Up to the limit of each rule."""
    assert rule(value) is None


@pytest.mark.parametrize(("rule", "value"), INVALID)
def test_explains_invalid_values_without_repeating_them(rule: Rule, value: str) -> None:
    """The error ends a sentence that begins with the name of the field."""
    error = rule(value)

    assert error
    assert error.startswith(("is ", "must "))
    assert len(value) < 3 or value not in error
