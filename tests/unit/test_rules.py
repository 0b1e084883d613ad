"""The rules of the fields of users and posts."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from service.posts.rules import CREATE_RULES as POST_RULES, content_error, title_error
from service.users.rules import RULES, email_error, normalise_email, password_error
from service.validation import Check

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


VALID: list[tuple[Check, Any]] = [
    (email_error, "a@b"),
    (email_error, "o'brien+tag@exa-mple.org"),
    (email_error, "é@例え.jp"),
    (email_error, "a" * 253 + "@b"),
    (RULES["full_name"].error, ""),
    (RULES["full_name"].error, "\n😀" * 127),
    (title_error, "x"),
    (title_error, "😀" * 255),
    (content_error, ""),
    (content_error, "x" * MIB),
    (content_error, "é" * (MIB // 2)),
    (password_error, " "),
    (password_error, "😀" * 1024),
]

INVALID: list[tuple[Check, Any]] = [
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
    (RULES["full_name"].error, "x" * 256),
    (RULES["full_name"].error, "A\0da"),
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
def test_accepts_valid_values(rule: Check, value: Any) -> None:
    """Up to the limit of each rule."""
    assert rule(value) is None


@pytest.mark.parametrize(("rule", "value"), INVALID)
def test_explains_invalid_values_without_repeating_them(rule: Check, value: str) -> None:
    """The error ends a sentence that begins with the name of the field."""
    error = rule(value)

    assert error
    assert error.startswith(("is ", "must "))
    assert len(value) < 3 or value not in error


FIELDS = {f"user.{name}": rule for name, rule in RULES.items()} | {
    f"post.{name}": rule for name, rule in POST_RULES.items() if name != "author_id"
}
# Valid and invalid values, and characters by which a joined column could be taken for another.
BCRYPT = "$2b$04$" + "." * 53
COLUMN_VALUES = st.one_of(
    st.none(),
    st.sampled_from([BCRYPT, f"{BCRYPT}\n{BCRYPT}", f"{BCRYPT}\n", "$2b$15$" + "." * 53]),
    st.sampled_from(["", "ada@example.org", "a@b.c\nd@e.f", "a@b\n", "\na@b", "A\0", "x" * 256, "Title"]),
    st.text(st.sampled_from("a@.\n\r\0\t ,;|\v\x1c\x85\u2028\ufeffÀ😀"), max_size=12),
)


@pytest.mark.parametrize("name", FIELDS)
@given(column=st.lists(COLUMN_VALUES, min_size=1, max_size=6))
def test_column_check_accepts_no_value_that_the_rule_refuses(name: str, column: list[str | None]) -> None:
    """However the values are combined."""
    rule = FIELDS[name]
    # Only optional fields have unset values.
    values = column if name in ("user.full_name", "user.hashed_password") else [text or "" for text in column]
    if rule.accepts_all(values):
        present = [value for value in values if value is not None]
        assert [rule.error(value) for value in present] == [None] * len(present)
        if name == "user.email":
            assert [normalise_email(email or "") for email in values] == values
