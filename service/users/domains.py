"""Domains of e-mails: one normal form for an internationalised domain and its ASCII form.

The normal form is Unicode, mapped as UTS 46 (https://unicode.org/reports/tr46/) has it: `bücher.de` for
`BÜCHER.de`, `bu\u0308cher.de` and `xn--bcher-kva.de`. Domains that IDNA 2008 excludes but registries have
sold, such as those of emoji, have both forms too.
"""

import unicodedata
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

import idna

from service.users.characters import invisible_error

ACE = "xn--"  # begins the ASCII form of a label: https://www.rfc-editor.org/rfc/rfc5890#section-2.3.2.1
MAX_DOMAIN = 253  # https://www.rfc-editor.org/rfc/rfc1035#section-2.3.4, without length octets
MAX_LABEL = 63
LONGEST_DOMAIN = MAX_DOMAIN + 1  # with the dot of the root
LONGEST_UNICODE_LABEL = MAX_LABEL - len(ACE)  # each character is at least one of the ASCII form
CACHED = 1024  # domains; most e-mails of a load share a few, and one that is not ASCII takes 20 µs


@lru_cache(CACHED)
def normalise_domain(domain: str) -> str:
    """Return a domain, or a part of one, in Unicode and in lower case.

    A domain with an invisible character is only in lower case and in NFC: UTS 46 would remove the character.
    So is one that is too long in any form: each label takes up to 0.3 ms, and the domain is refused anyway.
    """
    if domain.isascii() and (len(domain) > LONGEST_DOMAIN or ACE not in domain.lower()):
        return domain.lower()
    mapped = _map(domain)
    # The ASCII form is at least as long as the mapping: its own labels in ASCII form stay as they are.
    if mapped is None or len(mapped) > LONGEST_DOMAIN or invisible_error(domain):
        return unicodedata.normalize("NFC", domain.lower())
    return ".".join(_to_unicode(label) for label in mapped.split("."))


def ascii_domain(domain: str) -> str:
    """Return the ASCII form of a normalised domain; a label that is too long to have one stays as it is."""
    if domain.isascii():
        return domain
    return ".".join(_to_ascii(label) for label in domain.split("."))


@lru_cache(CACHED)
def domain_error(domain: str) -> str | None:
    """Check a normalised domain, or an IP address in brackets."""
    if domain.startswith("["):
        is_address = domain.endswith("]") and _is_address(domain[1:-1])
        return None if is_address else "must have an IP address in its brackets, as in [192.0.2.1]"
    if not domain.isascii() and _map(domain) != domain:
        return "must have a domain without invalid characters"
    labels = ascii_domain(domain).split(".")
    if not all(labels):
        return "must have a domain without empty labels, as in example.org"
    if max(map(len, labels)) > MAX_LABEL or not all(map(str.isascii, labels)):
        return f"must have a domain whose labels have at most {MAX_LABEL} octets"
    if sum(map(len, labels)) + len(labels) - 1 > MAX_DOMAIN:
        return f"must have a domain of at most {MAX_DOMAIN} octets"
    return None


def _map(domain: str) -> str | None:
    """Return the mapping of UTS 46, None if it doesn't allow one of the characters."""
    try:
        return idna.uts46_remap(domain, std3_rules=False)
    except idna.IDNAError:
        return None


def _to_unicode(label: str) -> str:
    """Return the Unicode form of a label in ASCII form; any other label as it is."""
    if not (label.startswith(ACE) and label.isascii()) or len(label) > MAX_LABEL:
        return label
    try:
        decoded = label.removeprefix(ACE).encode().decode("punycode")
    except ValueError:
        return label
    # Otherwise two labels in ASCII form would have one Unicode form, or the form would not be normal.
    is_canonical = not decoded.isascii() and _map(decoded) == decoded and _to_ascii(decoded) == label
    return decoded if is_canonical and not invisible_error(decoded) else label


def _to_ascii(label: str) -> str:
    # The time of Punycode grows with the square of the length: 3 ms for 240 characters.
    if label.isascii() or len(label) > LONGEST_UNICODE_LABEL:
        return label
    return ACE + label.encode("punycode").decode()


def _is_address(text: str) -> bool:
    # https://www.rfc-editor.org/rfc/rfc5321#section-4.1.3; in lower case
    is_version_6 = text.startswith("ipv6:")
    try:
        if is_version_6:
            IPv6Address(text.removeprefix("ipv6:"))
        else:
            IPv4Address(text)
    except ValueError:
        return False
    return True
