"""The rules of the fields of users and posts."""

import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from service.posts.rules import CREATE_RULES as POST_RULES, content_error, title_error
from service.users.rules import (
    RULES,
    are_plain_emails,
    email_error,
    email_key_error,
    email_spellings,
    normalise_email,
    normalise_email_part,
    password_error,
    stored_spellings,
)
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


# Domains in both forms: IANA's test domains (https://www.iana.org/domains/reserved), and others.
DOMAINS = [
    ("bücher.de", "xn--bcher-kva.de"),
    ("faß.de", "xn--fa-hia.de"),
    ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
    ("пример.испытание", "xn--e1afmkfd.xn--80akhbyknj4f"),
    ("παράδειγμα.δοκιμή", "xn--hxajbheg2az3al.xn--jxalpdlp"),
    ("उदाहरण.परीक्षा", "xn--p1b6ci4b4b3a.xn--11b5bs3a9aj6g"),
    ("실례.테스트", "xn--9n2bp8q.xn--9t4b11yi5a"),
    ("ශ්\u200dරී.com", "xn--10cl1a0b660p.com"),
    ("💩.la", "xn--ls8h.la"),
]


@pytest.mark.parametrize(("domain", "ascii_form"), DOMAINS)
def test_internationalised_domain_and_its_ascii_form_are_one(domain: str, ascii_form: str) -> None:
    """It is stored in Unicode, and found in either form, however an earlier release stored it."""
    stored, other = f"ada@{domain}", f"ada@{ascii_form}"

    assert normalise_email(stored) == normalise_email(other) == stored
    assert normalise_email(other.upper()) == normalise_email_part(other) == stored
    assert email_error(stored) is None
    assert set(email_spellings(stored)) == set(email_spellings(other)) == {stored, other}
    assert [*stored_spellings(["x@y", stored])] == [(other, stored)]


@pytest.mark.parametrize(
    ("email", "normal"),
    [
        ("ada@ＢÜＣＨＥＲ.de", "ada@bücher.de"),
        ("ada@ﬁrst。jp", "ada@first.jp"),
        ("ada@ΟΔΟΣ.gr", "ada@οδοσ.gr"),
        ("ada@example.org.", "ada@example.org"),
        ("ada@bücher.de。", "ada@bücher.de"),
        ('"Ada.L"@example.org', "ada.l@example.org"),
    ],
)
def test_spellings_of_one_mailbox_have_one_normal_form(email: str, normal: str) -> None:
    """An earlier release may have stored another one, which look-ups find too."""
    assert normalise_email(email) == normal
    assert email_spellings(email)[0] == normal
    assert unicodedata.normalize("NFC", email.lower()) in email_spellings(email)


@pytest.mark.parametrize(
    "email",
    [
        "\uff41da@example.org",
        "ﬁ@example.org",
        "xn--bcher-kva@example.org",
        "ada@xn--a.de",
        "ada@xn--zzzz99999.de",
        "ada@xn--bcher-kva-.de",
        '"ada,l"@example.org',
    ],
)
def test_different_mailboxes_keep_different_normal_forms(email: str) -> None:
    """RFC 6532 keeps compatibility characters in names apart; not every xn-- is an ASCII form."""
    assert normalise_email(email) == email
    assert email_error(email) is None


@pytest.mark.parametrize("part", ["@example.", '"ada"@x', ".", "@"])
def test_part_of_an_email_keeps_what_ends_a_whole_one(part: str) -> None:
    """The text may go on there."""
    assert normalise_email_part(part) == part


HIDDEN = {
    "invisible": "\u00ad\u034f\u061c\u115f\u180e\u200b\u200c\u200d\u200e\u202c\u202e\u2060\u2066\u2800"
    "\u3164\ufe0f\ufeff\uffa0\U000e0001\U000e0061\U000e0100",
    "control": "\0\x07\x1b\x7f\x80\x9f",
    "unassigned": "\u0378\ufdd0\ufffe\U0010ffff",
    "private-use": "\ue000\U00100000",
}


@pytest.mark.parametrize(("kind", "character"), [(kind, c) for kind, some in HIDDEN.items() for c in some])
@pytest.mark.parametrize(
    "template", ["{}ada@example.org", "a{}da@example.org", "ada@exa{}mple.org", "ada@bü{}.de"]
)
def test_invisible_character_in_an_email_is_refused_by_name(kind: str, character: str, template: str) -> None:
    """Two accounts could look the same; look-ups still accept what an earlier release stored."""
    email = normalise_email(template.format(character))

    if character != "\0":
        assert email_error(email) == f"must not contain the {kind} character U+{ord(character):04X}"
        assert email_key_error(email) is None
        assert email in email_spellings(template.format(character))
    assert email_error(email)


@pytest.mark.parametrize(
    "email",
    [
        "<ada@example.org>",
        "ada@example.org,",
        "ada@example.org;",
        "ada@example.org>",
        "mailto:ada@example.org",
        "ada@example.org:25",
        "ada(work)@example.org",
        "Ada<ada@example.org>",
        "a,b@example.org",
        "ada@[127.0.0.1",
        "ada@[127.0.0.256]",
        "ada@[example.org]",
        "ada@x..y",
        "ada@.x",
        "ada@x..",
        "ada@.",
        f"ada@{'x' * 64}.org",
        f"ada@{'ü' * 60}.org",
        f"ada@{'ü.' * 40}de",
        "ada@a\ufffdb.de",
        "ada\uff20example.org",
        '"ada@example.org',
        "'ada'\\@example.org",
    ],
)
def test_what_is_more_than_an_address_is_refused(email: str) -> None:
    """Separators of lists and mailboxes, and domains that the DNS can't have."""
    error = email_error(normalise_email(email))

    assert error
    assert error.startswith("must ")
    assert email not in error


# Addresses that providers hand out, or have handed out.
REAL = [
    "root@localhost",
    "o'brien@example.ie",
    "ada+tag@example.org",
    "user%example.com@example.org",
    "ada/dept=shipping@example.org",
    "!#$%&'*+-/=?^_`{|}~@example.org",
    "ada..lovelace.@docomo.ne.jp",
    ".ada@ezweb.ne.jp",
    "ada@host_name.example.org",
    "ada@[192.0.2.1]",
    "ada@[ipv6:2001:db8::1]",
    '"ada,lovelace"@example.org',
    "ada@r3---sn.example.org",
    "电子邮件测试@普遍适用测试.我爱你",
    "ईमेल-परीक्षण@सार्वभौमिक-स्वीकृति-परीक्षण.संगठन",
    "электронная-почта@универсальное-принятие-тест.москва",
    "données@fußballplatz.technology",
    "ශ්\u200dරී@example.lk",
    "\u062e\u0627\u0646\u0647\u200c\u0647\u0645@example.ir",
    "😀@💩.la",
    f"{'a' * 100}@example.org",
    f"ada@{'.'.join(['x' * 60] * 4)}",
]


@pytest.mark.parametrize("email", REAL)
def test_real_addresses_are_accepted_unchanged(email: str) -> None:
    """As single values."""
    assert normalise_email(email) == email
    assert email_error(email) is None


def test_column_of_ordinary_addresses_needs_no_look_at_each() -> None:
    """Plus signs, apostrophes and percent signs are ordinary."""
    assert are_plain_emails([email for email in REAL if email.isascii() and not set(email) & set('"[')])
    assert not are_plain_emails(["a@b", "ada@xn--bcher-kva.de"])


@pytest.mark.parametrize("domain", ["x", "x.", "例え.jp。"])
def test_email_too_long_to_normalise_stays_refused(domain: str) -> None:
    """Dropping a dot must not make it fit."""
    accents, rest = "\u0301" * 40, "A" * (214 - len(domain))
    email = f"A{accents}{rest}@{domain}"

    assert len(email) == 256
    assert "longer" in str(email_error(normalise_email(email)))
    assert "longer" in str(email_key_error(email_spellings(email)[0]))


DOCUMENTED = (Path(__file__).parents[2] / "docs/emails.md").read_text()


@pytest.mark.parametrize(("written", "normal"), re.findall(r"`([^`]*@[^`]*)` → `([^`]+)`", DOCUMENTED))
def test_documented_spellings_have_the_documented_normal_form(written: str, normal: str) -> None:
    """As docs/emails.md has them."""
    assert normalise_email(written) == normal


@pytest.mark.parametrize(
    ("examples", "decision"),
    re.findall(r"^\|.*?\| ([^|]*@[^|]*) \| (accepted|refused)", DOCUMENTED, re.MULTILINE),
)
def test_documented_examples_are_decided_as_documented(examples: str, decision: str) -> None:
    """Each of an accepted or refused row of docs/emails.md."""
    errors = [email_error(normalise_email(email)) for email in re.findall(r"`([^`]+)`", examples)]

    assert errors
    assert {"accepted" if error is None else "refused" for error in errors} == {decision}


@pytest.mark.parametrize(
    "domain",
    [
        ".".join(["XN--bcher-kva"] * 19),  # 265 octets; in Unicode 132 characters
        ".".join(["xn--e1afmkfd"] * 70),
        "BÜCHER." + ".".join(["xn--bcher-kva"] * 19),
        ".".join(["例え"] * 120),
        "ü." * 500 + "de",
    ],
)
def test_domain_that_is_too_long_in_any_form_is_only_in_lower_case(domain: str) -> None:
    """To convert it would take long, and the rule refuses it anyway."""
    normal = normalise_email(f"Ada@{domain}")

    assert normal == f"ada@{domain.lower()}"
    assert email_error(normal) == "is longer than 255 characters"


def test_longest_domain_is_converted() -> None:
    """Of 253 octets, and with the dot of the root after them."""
    labels = ["xn--bcher-kva"] * 17 + ["x" * 15]
    domain = ".".join(labels)
    assert len(domain) == 253

    for spelling in (domain, domain.upper(), f"{domain}."):
        normal = normalise_email(f"ada@{spelling}")
        assert normal == f"ada@{domain.replace('xn--bcher-kva', 'bücher')}"
        assert email_error(normal) is None


@pytest.mark.parametrize("characters", [58, 59, 60, 63, 64, 240])
def test_unicode_label_has_at_most_63_octets_in_ascii_form(characters: int) -> None:
    """As the codec of Python encodes it; labels that are certainly longer are not encoded."""
    label = "ü" * characters
    octets = len(label.encode("punycode")) + len("xn--")

    error = email_error(normalise_email(f"ada@{label}"))

    assert (error is None) == (octets <= 63)
    assert error in (None, "must have a domain whose labels have at most 63 octets")


@settings(deadline=None)
@given(name=texts, domain=st.text(st.sampled_from("xn--bcher-kva.ü ß\u0308\u200d。Σς@."), max_size=12))
def test_normal_form_of_a_domain_is_its_own_normal_form(name: str, domain: str) -> None:
    """And that of its ASCII form."""
    normal = normalise_email(f"{name}@{domain}")

    assert normalise_email(normal) == normal
    if email_error(normal) is None:
        assert {normalise_email(spelling) for spelling in email_spellings(normal)} == {normal}


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
    st.sampled_from(["a@xn--bcher-kva.de", "a@bücher.de", "a@x.", "<a@b>", "a@b,", f"a@{'x' * 64}", '"a"@b']),
    st.text(st.sampled_from("a@.\n\r\0\t ,;|\v\x1c\x85\u2028\ufeffÀ😀"), max_size=12),
    st.text(st.sampled_from("aA@.-<>[]:\"'\\\u200b\u200d\u202c\u00ad\ufe0f\u3164\ue000\u0378"), max_size=8),
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


# https://github.com/bytebase/bytebase/issues/18943, and relatives from
# https://www.unicode.org/Public/security/latest/confusables.txt
LOOKALIKES = [
    ("test\u043e@gmail.com", "Cyrillic and Latin"),
    ("\u0430da@example.org", "Cyrillic and Latin"),
    ("ada@ex\u0430mple.org", "Cyrillic and Latin"),
    ("ada@xn--exmple-4nf.org", "Cyrillic and Latin"),
    ("ad\u03b1@example.org", "Greek and Latin"),
    ("\u043c\u03bf\u043b@example.org", "Cyrillic and Greek"),
    ("\u0578ada@example.org", "Armenian and Latin"),
    ("ada.love\u0435lace+x@example.org", "Cyrillic and Latin"),
]


@pytest.mark.parametrize(("email", "scripts"), LOOKALIKES)
def test_letters_of_two_scripts_in_one_word_are_refused(email: str, scripts: str) -> None:
    """A reader takes such an e-mail for that of another user; the error names the scripts."""
    assert email_error(normalise_email(email)) == f"must not have {scripts} letters in one word"


@pytest.mark.parametrize(
    "email",
    [
        "ivan.\u0438\u0432\u0430\u043d\u043e\u0432@example.org",
        "\u043f\u043e\u0447\u0442\u0430@example.org",
        "\u03b1\u03b2\u03b3@example.org",
        "ada\u5c71\u7530@example.org",
        "5\u00b5m@example.org",
        "jos\u00e9@b\u00fccher.de",
        "info@\u0431\u0430\u043d\u043a-online.example",
    ],
)
def test_words_of_one_script_are_accepted(email: str) -> None:
    """Words of different scripts, and scripts that look like no other, are in real addresses."""
    assert email_error(normalise_email(email)) is None
