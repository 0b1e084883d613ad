"""Values of a field of a request: the limits of its rules and of its type, and random ones in between."""

from collections.abc import Iterator, Sequence
from itertools import chain, count, islice
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message_factory import GetMessageClass

from service.validation import MAX_ID

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
LIMITS = [0, 1, 50, 1000, 5000, 10_000, 1_000_000, MAX_ID]

HASH = "$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHRzb21lc2FsdA$RdescudvJCsgt3ub+b5dWRWJTmaaJObG"
EMAILS = [
    "ada@example.org",
    "Ada@Example.ORG ",
    "ada@b\u00fccher.de",
    "ada@xn--bcher-kva.de",
    "\u0430da@example.org",
    "e\u0301va@example.org",
    '"ada"@example.org',
    '"a b"@example.org',
    "ada@[127.0.0.1]",
    "ada@example.org.",
    "ada <ada@example.org>",
    "a@b@c",
    "@example.org",
    " @example.org",
    "ada@",
    "ada@example..org",
    "\u00a0ada@example.org",
    "\x1c ada@example.org",
    "ada\u00a0@example.org",
    "ada\u200b@example.org",
    " " * 250 + "ada@example.org",
    "ada@" + "xn--bcher-kva." * 18 + "de",
    "a" * 243 + "@example.org",
    "a" * 244 + "@example.org",
    "e\u0301" * 200 + "@example.org",
]
REQUEST_IDS = [
    "7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10",
    "7D0F7C0E-1C43-4B5B-8D5C-2A4B4C1F6A10",
    "7d0f7c0e1c434b5b8d5c2a4b4c1f6a10",
    "{7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10}",
    "urn:uuid:7d0f7c0e-1c43-4b5b-8d5c-2a4b4c1f6a10",
    "7d0f7c0e-1c43-1b5b-8d5c-2a4b4c1f6a10",
    "019a2f3e-7c43-7b5b-8d5c-2a4b4c1f6a10",
    "00000000-0000-0000-0000-000000000000",
]
FILTERS = ["id = 1", 'email : "@example.org"', "is_active = true", "title : 'x' OR id > 3", "id = 1 " * 300]
ORDERS = ["id", "id desc", " created_at  asc ", "email", "email\u00a0desc", "id,created_at", "ID", "title"]
# The texts with which the mutations of a field begin, by its name.
TEXTS = {
    "email": EMAILS,
    "author_email": EMAILS,
    "request_id": REQUEST_IDS,
    "hashed_password": [HASH, HASH.replace("id", "i"), "$2b$12$" + "x" * 53, "{bcrypt}", "x" * 32],
    "filter": FILTERS,
    "order_by": ORDERS,
}
PATHS = ["email", "full_name", "is_active", "password", "hashed_password", "title", "content", "*"]
PATHS += ["author_id", "version", "full_name.x", "", "posts", "Email"]
# Lone surrogates are missing: no message can hold one.
CHARACTERS = (
    "aZ09@.@éßЯ字\U0001f600"
    " \t\n\v\x85\xa0\u1680\u2028\u3000"  # white space
    "\x00\x1c\x7f\u0301\u0345\u200b\u202e\ufeff\ue000\u0378"
)
LENGTHS = [254, 255, 256, 511, 512, 513, 1023, 1024, 1025, 1999, 2000, 2001]
SIZES = [0, 1, 2, 999, 1000, 1001]
LARGE_TEXTS = ["x" * (1 << 20), "x" * ((1 << 20) + 1), "é" * (1 << 19), "é" * (1 << 19) + "x", "字" * 350_000]
MAX_ROWS = 5000


def values(field: FieldDescriptor, fillings: dict[str, Any], random: Random, number: int) -> Iterator[Any]:
    """Yield at least this many values, each edge included; `fillings` are valid values of fields by name."""
    edges = list(_edges(field, fillings))
    more = (_random(field, fillings, random) for _ in count())
    return chain(edges, islice(more, max(number - len(edges), 0)))


def _edges(field: FieldDescriptor, fillings: dict[str, Any]) -> Iterator[Any]:
    if field.is_repeated:
        yield from _edges_of_lists(field, fillings)
    elif field.message_type is not None:
        yield GetMessageClass(field.message_type)()
    elif field.type == FieldDescriptor.TYPE_STRING:
        yield from _texts(field.name)
    elif field.type == FieldDescriptor.TYPE_ENUM:
        yield from [-1, *range(8), 99, INT32_MIN, INT32_MAX]
    else:
        yield from _numbers(field)


def _numbers(field: FieldDescriptor) -> list[int]:
    least, most = (
        (INT32_MIN, INT32_MAX) if field.type == FieldDescriptor.TYPE_INT32 else (INT64_MIN, INT64_MAX)
    )
    near = {limit + step for limit in [*LIMITS, least, most] for step in (-2, -1, 0, 1, 2)}
    return sorted(number for number in near if least <= number <= most)


def _texts(name: str) -> Iterator[str]:
    yield from TEXTS.get(name, [])
    yield ""
    yield from CHARACTERS
    for length in LENGTHS:
        for character in ("x", "é", "\U0001f600", "e\u0301"):
            yield (character * length)[:length]
    if name == "content":
        yield from LARGE_TEXTS


def _edges_of_lists(field: FieldDescriptor, fillings: dict[str, Any]) -> Iterator[Any]:
    if field.message_type is not None:
        row = GetMessageClass(field.message_type)(**fillings[field.message_type.name])
        for size in (0, 1, MAX_ROWS, MAX_ROWS + 1):
            yield [row] * size
        return
    if field.type == FieldDescriptor.TYPE_ENUM:
        yield from ([value] for value in range(-1, 8))
        return
    for size in SIZES:
        yield [*range(1, size + 1)]
        yield [*range(size)]
    for number in _numbers(field):
        yield [number]
        yield [1, number, 2]


def _random(field: FieldDescriptor, fillings: dict[str, Any], random: Random) -> Any:
    if field.is_repeated:
        return [_random_item(field, fillings, random) for _ in range(random.choice([0, 1, 1, 2, 3]))]
    return _random_item(field, fillings, random)


def _random_item(field: FieldDescriptor, fillings: dict[str, Any], random: Random) -> Any:
    if field.message_type is not None:
        return _random_message(field.message_type, fillings, random)
    if field.type == FieldDescriptor.TYPE_STRING:
        return _random_text(field.name, random)
    if field.type == FieldDescriptor.TYPE_ENUM:
        return random.choice([0, 1, 2, 3, random.randint(INT32_MIN, INT32_MAX)])
    is_small = field.type == FieldDescriptor.TYPE_INT32
    bits = random.randint(1, 31 if is_small else 63)
    return random.choice([1, 1, -1]) * random.randrange(1 << bits)


def _random_message(message: Descriptor, fillings: dict[str, Any], random: Random) -> Any:
    """Return a message in which some fields have valid values, or an update mask with some paths."""
    kind = GetMessageClass(message)
    if message.full_name == "google.protobuf.FieldMask":
        size = random.choice([0, 1, 1, 1, 2, 3, 100, 101])
        return kind(paths=random.choices(PATHS, k=size) if size < 100 else [random.choice(PATHS)] * size)
    filling = fillings[message.name]
    return kind(
        **{name: filling[name] for name in random.sample([*filling], random.randint(0, len(filling)))}
    )


def _random_text(name: str, random: Random) -> str:
    """Return a valid text of the field with a few changes, or characters of all sorts."""
    starts: Sequence[str] = TEXTS.get(name, [])
    if not starts or random.random() < 0.1:
        return "".join(random.choices(CHARACTERS, k=random.choice([1, 2, 5, 20, random.randint(0, 1100)])))
    text = random.choice(starts)
    for _ in range(random.choice([0, 1, 1, 2, 3])):
        start = random.randint(0, len(text))
        text = (
            text[:start]
            + random.choice(["", random.choice(CHARACTERS)])
            + text[start + random.randint(0, 1) :]
        )
    return text
