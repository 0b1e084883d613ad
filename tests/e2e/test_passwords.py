"""Passwords: which are valid, the cost of a check, and that no hash is ever returned."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import bcrypt
import grpc
import pytest
from argon2 import PasswordHasher, Type
from argon2.low_level import hash_secret
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import update

from roster.errors import DatabaseUnavailable, OutcomeUnknown, RosterError, StatementTimeout
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import (
    BatchGetUsersRequest,
    CreateUserRequest,
    ExportUsersRequest,
    GetUserRequest,
    ListUsersRequest,
    UpdateUserRequest,
    VerifyPasswordRequest,
    VerifyPasswordResponse,
)
from roster.v1.users_pb2_grpc import UserServiceAsyncStub
from service.auth.caller import NOBODY, Caller, set_caller
from service.metrics import HASHES_UNREADABLE
from service.server import Server
from service.settings import Settings
from service.users.model import User as UserRow
from service.users.passwords import Passwords
from service.users.repository import CREDENTIALS, UserRepository, credentials_from_row
from tests.support.errors import refusal
from tests.support.server import serve

PASSWORD = "correct horse battery staple"
# What the settings have by default.
OURS = PasswordHasher(time_cost=2, memory_cost=19_456, parallelism=1)
ONE_HASH = "argon2id m=19456,t=2,p=1"
STRONG = PasswordHasher(time_cost=3, memory_cost=32_768, parallelism=1).hash(PASSWORD)
WEAK = {
    "argon2id m=8,t=1,p=1": PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash(PASSWORD),
    "bcrypt 04": bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)).decode(),
}
# In another spelling, and of the version before 1.3.
RESPELT = STRONG.replace("m=32768,t=3,p=1", "p=1,t=3,m=32768")
VERSION_1_0 = hash_secret(PASSWORD.encode(), b"saltsalt", 3, 32_768, 1, 32, Type.ID, version=16).decode()


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server that hashes one password at a time, with a queue of one."""
    async with serve(database_url, password_workers=1, password_queue=1) as server:
        yield server


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hashes made and checked by the libraries, each with its kind and cost."""
    done: list[str] = []
    verify, make, checkpw = PasswordHasher.verify, PasswordHasher.hash, bcrypt.checkpw

    def counting_verify(hasher: PasswordHasher, stored: str, password: bytes) -> bool:
        done.append(" ".join(stored.split("$")[1:4:2]))
        return verify(hasher, stored, password)

    def counting_hash(hasher: PasswordHasher, password: str) -> str:
        made = make(hasher, password)
        done.append(" ".join(made.split("$")[1:4:2]))
        return made

    def counting_checkpw(password: bytes, stored: bytes) -> bool:
        done.append(f"bcrypt {stored.decode().split('$')[2]}")
        return checkpw(password, stored)

    monkeypatch.setattr(PasswordHasher, "verify", counting_verify)
    monkeypatch.setattr(PasswordHasher, "hash", counting_hash)
    monkeypatch.setattr(bcrypt, "checkpw", counting_checkpw)
    return done


@pytest.fixture
async def ada(users: UserServiceAsyncStub) -> User:
    """A user with a password."""
    return await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org", password=PASSWORD)))


async def verified(users: UserServiceAsyncStub, **asked: Any) -> VerifyPasswordResponse:
    return await users.VerifyPassword(VerifyPasswordRequest(**{"password": PASSWORD, **asked}))


async def stored_hash(server: Server, id: int) -> str:
    return credentials_from_row(await server.users.find_columns(id, CREDENTIALS))[1]


async def test_right_password_is_valid(users: UserServiceAsyncStub, ada: User, work: list[str]) -> None:
    """By id or by e-mail in any spelling; the response has the user."""
    answers = [await verified(users, id=ada.id), await verified(users, email=" ADA@example.org")]

    assert answers == [VerifyPasswordResponse(valid=True, user=ada)] * 2
    assert work == [ONE_HASH] * 2


async def test_failures_are_indistinguishable(
    users: UserServiceAsyncStub, ada: User, work: list[str]
) -> None:
    """Wrong password, unknown, inactive, without a password: the same response, at the cost of one hash."""
    away = User(email="away@example.org", password=PASSWORD, is_active=False)
    open_door = User(email="open@example.org")
    imported = User(email="imported@example.org", hashed_password=WEAK["bcrypt 04"], is_active=False)
    for user in (away, open_door, imported):
        user.id = (await users.CreateUser(CreateUserRequest(user=user))).id

    for asked in (
        {"id": ada.id, "password": PASSWORD[:-1]},
        {"email": ada.email, "password": PASSWORD + " "},
        {"id": 4711},
        {"email": "nobody@example.org"},
        {"id": imported.id},
        {"id": away.id},
        {"email": away.email},
        {"id": open_door.id},
        {"id": open_door.id, "password": "nobody's password"},
        {"id": 4711, "password": "nobody's password"},
    ):
        work.clear()
        assert await verified(users, **asked) == VerifyPasswordResponse()
        assert work == [ONE_HASH]


UNREADABLE = {
    "sha512-crypt": "$6$rounds=5000$saltsalt$" + "a" * 86,
    "cut off": WEAK["bcrypt 04"][:-1],
    "plain text": "correct horse battery staple",
    "argon2 with too little memory": STRONG.replace("m=32768", "m=7"),
    "costs that OpenSSL refuses": "$scrypt$ln=31,r=8,p=1$c2FsdHNhbHQ$" + "A" * 43,
}


@pytest.mark.parametrize("stored", UNREADABLE.values(), ids=UNREADABLE)
async def test_unreadable_hash_is_an_error(
    server: Server,
    users: UserServiceAsyncStub,
    ada: User,
    work: list[str],
    caplog: pytest.LogCaptureFixture,
    stored: str,
) -> None:
    """Written past the service: a status of its own, a log line and a metric, at the same cost."""
    async with server.database.begin() as session:
        await session.execute(update(UserRow).where(UserRow.id == ada.id).values(hashed_password=stored))
    before = HASHES_UNREADABLE._value.get()

    for password in (PASSWORD, "wrong"):
        work.clear()
        refused = await refusal(verified(users, id=ada.id, password=password))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "UNREADABLE_HASH")
        assert work[-1] == ONE_HASH
    assert HASHES_UNREADABLE._value.get() == before + 2
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [f"user {ada.id} can't" in line for line in lines] == [True, True]
    assert stored[-20:] not in "".join(lines)
    assert (await verified(users, id=4711)).valid is False

    await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, password=PASSWORD)))
    assert (await verified(users, id=ada.id)).valid is True


async def test_inactive_user_with_an_unreadable_hash_is_not_distinguishable(
    server: Server, users: UserServiceAsyncStub, ada: User
) -> None:
    """Nobody would be let in with any password."""
    async with server.database.begin() as session:
        values = {"hashed_password": "x", "is_active": False}
        await session.execute(update(UserRow).where(UserRow.id == ada.id).values(values))

    assert await verified(users, id=ada.id) == VerifyPasswordResponse()


async def test_stored_bcrypt_hash_with_padding_bits_lets_its_owner_in(
    server: Server, users: UserServiceAsyncStub
) -> None:
    """Of an import by an earlier release, and of one today; a success replaces it."""
    stored = "$2a$12$oaQbBqq8JnSM1NHRPQGXORm4GCUMqp7meTnkft4zgSnrbhoKdDV0C"
    ada = await users.CreateUser(
        CreateUserRequest(user=User(email="ada@example.org", hashed_password=stored))
    )

    assert (await verified(users, id=ada.id, password="loppuy")).valid is False
    assert (await verified(users, id=ada.id, password="loppux")).valid is True
    assert OURS.check_needs_rehash(await stored_hash(server, ada.id)) is False


async def test_changed_password_replaces_the_old_one(users: UserServiceAsyncStub, ada: User) -> None:
    """The old password is no longer valid."""
    changed = await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, password="new")))

    assert changed.version == 2
    assert (await verified(users, id=ada.id)).valid is False
    assert (await verified(users, id=ada.id, password="new")).user == changed


async def test_star_mask_keeps_the_password_if_unset(users: UserServiceAsyncStub, ada: User) -> None:
    """`*` writes the password only if the request has one."""
    user = User(id=ada.id, email=ada.email, is_active=True)
    request = UpdateUserRequest(user=user, update_mask=FieldMask(paths=["*"]))
    await users.UpdateUser(request)
    assert (await verified(users, id=ada.id)).valid is True

    request.user.password = "new"
    await users.UpdateUser(request)
    assert (await verified(users, id=ada.id, password="new")).valid is True


@pytest.mark.parametrize("kind", WEAK)
async def test_weak_hash_is_replaced_after_success(
    server: Server, users: UserServiceAsyncStub, work: list[str], kind: str
) -> None:
    """A failure costs the same and replaces nothing; version and time stay."""
    weak = WEAK[kind]
    user = User(email="ada@example.org", hashed_password=weak)
    ada = await users.CreateUser(CreateUserRequest(user=user))

    await verified(users, id=ada.id, password="wrong")
    assert await stored_hash(server, ada.id) == weak
    assert (await verified(users, id=ada.id)).user == ada
    stronger = await stored_hash(server, ada.id)
    assert OURS.check_needs_rehash(stronger) is False
    assert work == [kind, ONE_HASH] * 2

    assert (await verified(users, id=ada.id)).user == ada
    assert await stored_hash(server, ada.id) == stronger
    assert await users.GetUser(GetUserRequest(id=ada.id)) == ada


@pytest.mark.parametrize("stored", [STRONG, RESPELT], ids=["as ours", "respelt"])
async def test_stronger_hash_is_not_replaced(
    server: Server, users: UserServiceAsyncStub, stored: str
) -> None:
    """Hashes of other systems can be stronger than ours, however they are spelt."""
    ada = await users.CreateUser(
        CreateUserRequest(user=User(email="ada@example.org", hashed_password=stored))
    )

    assert (await verified(users, id=ada.id)).valid is True
    assert await stored_hash(server, ada.id) == stored


async def test_hash_of_an_older_version_is_replaced(server: Server, users: UserServiceAsyncStub) -> None:
    """Argon2 1.0 is weaker than 1.3, whatever its costs."""
    ada = await users.CreateUser(
        CreateUserRequest(user=User(email="ada@example.org", hashed_password=VERSION_1_0))
    )

    assert (await verified(users, id=ada.id)).valid is True
    assert OURS.check_needs_rehash(await stored_hash(server, ada.id)) is False


@pytest.mark.parametrize("fault", [DatabaseUnavailable, StatementTimeout, OutcomeUnknown])
async def test_failure_to_replace_a_hash_does_not_fail_the_check(
    server: Server, users: UserServiceAsyncStub, monkeypatch: pytest.MonkeyPatch, fault: type[RosterError]
) -> None:
    """The next successful check replaces it."""
    weak = WEAK["bcrypt 04"]
    ada = await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org", hashed_password=weak)))

    async def busy(*_: object) -> None:
        raise fault("the database is busy with other writes")

    monkeypatch.setattr(UserRepository, "replace_hash", busy)
    assert (await verified(users, id=ada.id)).user == ada
    assert await stored_hash(server, ada.id) == weak


async def test_password_is_stored_as_argon2id_hash(server: Server, users: UserServiceAsyncStub) -> None:
    """Each hash has its own salt."""
    ids = [
        (await users.CreateUser(CreateUserRequest(user=User(email=email, password=PASSWORD)))).id
        for email in ("ada@example.org", "alan@example.org")
    ]

    first, second = [await stored_hash(server, id) for id in ids]
    assert first.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert first.split("$")[4] != second.split("$")[4]


async def test_no_response_has_a_password_or_hash(server: Server, users: UserServiceAsyncStub) -> None:
    """Of all calls, whatever the request has."""
    user = User(email="ada@example.org", hashed_password=STRONG)
    user.id = (await users.CreateUser(CreateUserRequest(user=user))).id
    changed = UpdateUserRequest(user=User(id=user.id, password=PASSWORD), request_id="0" * 32)
    answers = [
        await users.UpdateUser(changed),
        await users.UpdateUser(changed),
        await users.GetUser(GetUserRequest(id=user.id)),
        *(await users.BatchGetUsers(BatchGetUsersRequest(ids=[user.id], view=User.WITH_POSTS))).users,
        *(await users.ListUsers(ListUsersRequest())).users,
        *[user async for message in users.ExportUsers(ExportUsersRequest()) for user in message.users],
        (await verified(users, id=user.id)).user,
    ]

    assert len(answers) == 7
    assert {(user.id, user.password, user.hashed_password) for user in answers} == {(user.id, "", "")}


async def test_cancelled_check_occupies_its_thread_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread can't be interrupted, so a cancelled call gives its caller no further thread."""
    passwords = Passwords(Settings(password_workers=2))
    loop, both, may_end = asyncio.get_running_loop(), asyncio.Event(), threading.Event()
    begun: list[str] = []

    def slow(stored: str, password: str) -> tuple[bool, None]:
        begun.append(stored)
        if len(begun) == 2:
            loop.call_soon_threadsafe(both.set)
        return may_end.wait(60), None

    monkeypatch.setattr(passwords, "_check", slow)
    set_caller(Caller("greedy"))
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(passwords.check("greedy", PASSWORD), 0.05)
    set_caller(Caller("modest"))
    modest = asyncio.create_task(passwords.check("modest", PASSWORD))
    await both.wait()
    assert begun == ["greedy", "modest"]

    may_end.set()
    assert (await modest)[0] is True
    set_caller(NOBODY)
    passwords.close()


async def test_full_password_queue_refuses_calls(
    server: Server, users: UserServiceAsyncStub, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checks and changes are retryable, and succeed once the queue has room."""
    loop = asyncio.get_running_loop()
    begun, may_end = asyncio.Event(), threading.Event()

    def slow(stored: str, password: str) -> tuple[bool, None]:
        loop.call_soon_threadsafe(begun.set)
        return may_end.wait(60), None

    monkeypatch.setattr(server.passwords, "_check", slow)
    first = asyncio.ensure_future(verified(users, id=ada.id))
    await begun.wait()
    for call in (
        verified(users, id=ada.id),
        users.CreateUser(CreateUserRequest(user=User(email="alan@example.org", password="x"))),
        users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, password="x"))),
    ):
        refused = await refusal(call)
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "OVERLOADED")
        assert refused.retry_seconds

    may_end.set()
    assert (await first).valid is True
    assert (await verified(users, id=ada.id)).valid is True
