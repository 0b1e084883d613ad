"""Generates the rows to load: realistic, and the same in every run."""

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import Post as PostMessage, User as UserMessage

BATCH = 5000

UserRow = tuple[str, str | None, str, bool]  # email, full_name, hashed_password, is_active
PostRow = tuple[str, str, int]  # title, content, author_id
ChangeRow = tuple[int, str, bool]  # id, full_name, is_active

FIRST = ("Ada", "Alan", "Barbara", "Claude", "Dennis", "Edsger", "Frances", "Grace", "Jim", "Leslie")
LAST = (
    "Allen",
    "Dijkstra",
    "Gray",
    "Hopper",
    "Lamport",
    "Liskov",
    "Lovelace",
    "Ritchie",
    "Shannon",
    "Turing",
)
DOMAINS = ("example.org", "mail.example.com", "example.net")
BASE64 = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
WORDS = "rows that were acknowledged stay; what was not is wholly in or wholly out, whatever broke"


def make_users(count: int, make_hash: Callable[[Random], str] | None = None) -> list[UserRow]:
    """Return users in random order, with distinct e-mails of about 30 characters and hashed passwords.

    One in five has no name. The hashes are argon2id's unless `make_hash` makes others.
    """
    random = Random(1)
    numbers = random.sample(range(count), count)
    return [_user(random, number, make_hash or argon2id) for number in numbers]


def argon2id(random: Random) -> str:
    """Return a text in the form of argon2-cffi's default hashes, with a random salt and digest."""
    return f"$argon2id$v=19$m=65536,t=3,p=4${_base64(random, 16)}${_base64(random, 32)}"


def any_hash(random: Random) -> str:
    """Return a hash of one of the algorithms that users have after some migrations."""
    return random.choice((argon2id, _bcrypt, _django, _scrypt))(random)


def _bcrypt(random: Random) -> str:
    # The last character of the salt has two bits, that of the digest four.
    salt = "".join(random.choices(BASE64, k=21)) + random.choice(".Oeu")
    digest = "".join(random.choices(BASE64, k=30)) + random.choice(".CGKOSWaeimquy26")
    return f"$2b${random.choice((10, 12))}${salt}{digest}"


def _django(random: Random) -> str:
    salt = "".join(random.choices(BASE64[2:], k=22))
    return f"pbkdf2_sha256${random.choice((260_000, 600_000))}${salt}${_base64(random, 32)}="


def _scrypt(random: Random) -> str:
    return f"$scrypt$ln=16,r=8,p=1${_base64(random, 16)}${_base64(random, 32)}"


def _base64(random: Random, size: int) -> str:
    return b64encode(random.randbytes(size)).decode().rstrip("=")


def add_duplicates(users: Sequence[UserRow]) -> list[UserRow]:
    """Return the users, with every tenth replaced by a random earlier one."""
    random = Random(2)
    sent: list[UserRow] = []
    for position, user in enumerate(users):
        sent.append(random.choice(sent) if position % 10 == 9 else user)  # noqa: PLR2004  (the tenth)
    return sent


def make_posts(count: int, authors: int) -> list[PostRow]:
    """Return posts with a title of 60 characters and a content of 300, by the users 1 to `authors`."""
    random = Random(3)
    text = " ".join(random.choices(WORDS.split(), k=10_000))
    starts = range(len(text) - 300)
    return [
        (text[start : start + 60], text[start : start + 300], random.randint(1, authors))
        for start in random.choices(starts, k=count)
    ]


def make_changes(users: Sequence[UserRow]) -> list[ChangeRow]:
    """Return a new name and state for each of the users 1, 2, 3, …, in random order."""
    changes = [
        (id, f"{name or 'Name'} II", not is_active)
        for id, (_, name, _, is_active) in enumerate(users, start=1)
    ]
    Random(4).shuffle(changes)
    return changes


def user_message(user: UserRow) -> UserMessage:
    """Return a row to create."""
    email, full_name, hashed_password, is_active = user
    return UserMessage(email=email, full_name=full_name, hashed_password=hashed_password, is_active=is_active)


def post_message(post: PostRow, users: Sequence[UserRow]) -> PostMessage:
    """Return a row to create, with the e-mail of its author."""
    title, content, author_id = post
    return PostMessage(title=title, content=content, author_email=users[author_id - 1][0])


def change_message(change: ChangeRow) -> UserMessage:
    """Return a row to update."""
    id, full_name, is_active = change
    return UserMessage(id=id, full_name=full_name, is_active=is_active)


def bulk_options(load_id: str, **options: Any) -> BulkOptions:
    """Return the options of a stream; the ids are always returned."""
    return BulkOptions(load_id=load_id, return_ids=True, **options)


def requests(kind: Any, field: str, rows: Sequence[Any], options: BulkOptions) -> list[bytes]:
    """Return a whole stream as serialized messages of 5,000 rows."""
    stream = [
        kind(offset=start, **{field: rows[start : start + BATCH]}) for start in range(0, len(rows), BATCH)
    ]
    stream[0].options.CopyFrom(options)
    stream[-1].finish = True
    return [message.SerializeToString() for message in stream]


def copy_text(rows: Iterable[tuple[Any, ...]]) -> str:
    r"""Return rows in COPY's text format; these rows contain nothing that must be escaped."""
    return "".join("\t".join(map(_field, row)) + "\n" for row in rows)


def _field(value: Any) -> str:
    if value is None:
        return r"\N"
    return ("f", "t")[value] if isinstance(value, bool) else str(value)


def _user(random: Random, number: int, make_hash: Callable[[Random], str]) -> UserRow:
    first, last = random.choice(FIRST), random.choice(LAST)
    email = f"{first}.{last}{number}@{random.choice(DOMAINS)}".lower()
    name = f"{first} {last}" if random.random() < 0.8 else None  # noqa: PLR2004  (one in five has none)
    return email, name, make_hash(random), random.random() < 0.9  # noqa: PLR2004
