"""Page tokens: each holds the last key of a page, and any other text is refused."""

import string
from base64 import urlsafe_b64decode
from datetime import UTC, date, datetime, timedelta
from itertools import product
from typing import Any

import pytest
from hypothesis import given, strategies as st
from sqlalchemy import Dialect, make_url

from roster.errors import InvalidField, InvalidPageToken
from service.db.paging import Keyset, decode_token, encode_token, fingerprint, page_size
from service.db.token_cipher import TokenCipher
from service.users.repository import UserRepository

SORTABLE = UserRepository.sortable
LISTING = fingerprint("users", "", "id", False)
TODAY = date(2024, 2, 29)
KEYS = {TODAY: bytes(32), TODAY + timedelta(days=1): bytes(range(32))}
CIPHER = TokenCipher(KEYS, lambda: TODAY)

ids = st.integers(1, 2**53)
times = st.datetimes(timezones=st.just(UTC))
keys = {
    "id": st.tuples(ids),
    "email": st.tuples(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=255)
    ),
    "created_at": st.tuples(times, ids),
}
positions = st.sampled_from(sorted(keys)).flatmap(lambda field: st.tuples(st.just(field), keys[field]))


@given(position=positions)
def test_token_decodes_to_its_key(position: tuple[str, tuple[Any, ...]]) -> None:
    """Ids, texts and times are unchanged."""
    field, key = position

    for cipher in (None, CIPHER):
        token = encode_token(LISTING, key, cipher)
        assert decode_token(LISTING, token, SORTABLE[field], cipher) == list(key)


def test_encrypted_token_reveals_no_part_of_its_key() -> None:
    """Two tokens of one page have the version and the day in common."""
    one, other = (urlsafe_b64decode(encode_token(LISTING, ["ada@example.org"], CIPHER)) for _ in "ab")

    assert one[:5] == other[:5] == b"\2" + TODAY.toordinal().to_bytes(4, "big")
    assert one[5:] != other[5:]
    assert b"ada" not in one


def test_every_server_reads_tokens_of_the_week() -> None:
    """Also those of a server whose clock is a day ahead; none whose key has been deleted."""
    columns = SORTABLE["email"]
    tomorrow = TokenCipher(KEYS, lambda: TODAY + timedelta(days=1))
    tokens = [encode_token(LISTING, ["ada@example.org"], cipher) for cipher in (CIPHER, tomorrow)]

    for cipher, token in product((CIPHER, tomorrow), tokens):
        assert decode_token(LISTING, token, columns, cipher) == ["ada@example.org"]
    later = TokenCipher({TODAY + timedelta(days=1): bytes(range(32))})
    with pytest.raises(InvalidPageToken, match="expired"):
        decode_token(LISTING, tokens[0], columns, later)


def test_reads_token_of_an_earlier_release() -> None:
    """Which was not encrypted."""
    token = "AQpa-ENvJa9WiyjHwlsiYWRhQGV4YW1wbGUub3JnIl0"
    assert decode_token(fingerprint("users", "", "email", False, 0), token, SORTABLE["email"], CIPHER) == [
        "ada@example.org"
    ]


def test_token_encrypted_with_another_key_is_refused() -> None:
    """As after the restore of a database."""
    token = encode_token(LISTING, ["ada@example.org"], TokenCipher({TODAY: bytes(31) + b"1"}, lambda: TODAY))

    with pytest.raises(InvalidPageToken, match="damaged"):
        decode_token(LISTING, token, SORTABLE["email"], CIPHER)


@pytest.mark.parametrize("id", [1, 12, 123])  # the length of a token decides how much its last character says
@pytest.mark.parametrize("cipher", [None, CIPHER], ids=["plain", "encrypted"])
def test_token_with_one_changed_character_is_refused(id: int, cipher: TokenCipher | None) -> None:
    """Whichever character it is."""
    token = encode_token(LISTING, [id], cipher)
    alphabet = string.printable + "\0é"

    for position, character in product(range(len(token)), alphabet):
        if character != token[position]:
            changed = token[:position] + character + token[position + 1 :]
            with pytest.raises(InvalidPageToken, match="damaged"):
                decode_token(LISTING, changed, SORTABLE["id"], cipher)


@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_invalid_token_is_refused(text: str) -> None:
    """Any text but the empty one, which asks for the first page."""
    with pytest.raises(InvalidPageToken, match="damaged"):
        decode_token(LISTING, text, SORTABLE["id"])


@pytest.mark.parametrize("cut", [1, 4, 8, -1, -4])
def test_truncated_token_is_refused(cut: int) -> None:
    """At either end."""
    token = encode_token(LISTING, [4711])

    for part in (token[:cut], token[cut:]):
        with pytest.raises(InvalidPageToken, match="damaged"):
            decode_token(LISTING, part, SORTABLE["id"])


def test_last_page_has_an_empty_token() -> None:
    """An empty token asks for the first page."""
    assert encode_token(LISTING, None) == ""
    assert decode_token(LISTING, "", SORTABLE["id"]) is None


def test_token_is_bound_to_its_listing() -> None:
    """Another filter, order, direction or resource refuses it."""
    listings = [
        fingerprint(*parts)
        for parts in [
            ("users", "", "id", False),
            ("users", "id > 1", "id", False),
            ("users", "", "created_at", False),
            ("users", "", "id", True),
            ("posts", "", "id", False),
        ]
    ]

    for own in listings:
        token = encode_token(own, [4711])
        for other in listings:
            if other == own:
                assert decode_token(other, token, SORTABLE["id"]) == [4711]
            else:
                with pytest.raises(InvalidPageToken, match="another listing"):
                    decode_token(other, token, SORTABLE["id"])


@pytest.mark.parametrize(
    ("requested", "rows"), [(0, 50), (1, 1), (1000, 1000), (1001, 1000), (2**31 - 1, 1000)]
)
def test_page_has_50_rows_by_default_and_at_most_1000(requested: int, rows: int) -> None:
    """Larger sizes are reduced to 1000."""
    assert page_size(requested) == rows


def test_negative_page_size_is_refused() -> None:
    """Zero means the default."""
    with pytest.raises(InvalidField, match="page_size"):
        page_size(-1)


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "sqlite+aiosqlite"])
@pytest.mark.parametrize(("descending", "operator"), [(False, ">"), (True, "<")])
def test_next_page_starts_by_one_row_comparison(driver: str, descending: bool, operator: str) -> None:
    """With OR the index would not be used, and deep pages would cost more."""
    dialect: Dialect = make_url(f"{driver}://").get_dialect()()
    after = Keyset(SORTABLE["created_at"], descending).after([datetime(2024, 1, 1, tzinfo=UTC), 4711])

    assert f"(users.created_at, users.id) {operator} (" in str(after.compile(dialect=dialect))
