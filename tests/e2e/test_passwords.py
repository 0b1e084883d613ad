"""Passwords: who is let in, what it costs to ask, and that no hash is ever shown."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from argon2 import Parameters, PasswordHasher, extract_parameters
from google.protobuf.field_mask_pb2 import FieldMask

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
from roster.v1.users_pb2_grpc import UserServiceStub
from service.server import Server
from service.settings import Settings
from tests.errors import refusal

PASSWORD = "correct horse battery staple"
ONE_HASH = extract_parameters(PasswordHasher().hash(PASSWORD))
WEAK = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@pytest.fixture
async def server(database_url: str) -> AsyncIterator[Server]:
    """A server that hashes one password at a time and refuses more."""
    settings = Settings(database_url=database_url, listen="127.0.0.1:0", password_workers=1, password_queue=1)
    server = Server(settings)
    await server.start()
    yield server
    await server.stop(grace=0)


@pytest.fixture
def work(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[Parameters]:
    """What each check of a password against a hash has cost."""
    done: list[Parameters] = []
    matches = server.passwords._matches

    def counting(stored: str, password: str) -> bool:
        done.append(extract_parameters(stored))
        return matches(stored, password)

    monkeypatch.setattr(server.passwords, "_matches", counting)
    return done


@pytest.fixture
async def ada(users: UserServiceStub) -> User:
    """A user with a password."""
    return await users.CreateUser(CreateUserRequest(user=User(email="ada@example.org", password=PASSWORD)))


async def verified(users: UserServiceStub, **asked: Any) -> VerifyPasswordResponse:
    return await users.VerifyPassword(VerifyPasswordRequest(**{"password": PASSWORD, **asked}))


async def stored_hash(server: Server, id: int) -> str:
    return (await server.users.password_hash(id))[1]


async def test_the_right_password_is_valid(users: UserServiceStub, ada: User, work: list[Parameters]) -> None:
    """By id or by e-mail, in any spelling; the answer has the user."""
    answers = [await verified(users, id=ada.id), await verified(users, email=" ADA@example.org")]

    assert answers == [VerifyPasswordResponse(valid=True, user=ada)] * 2
    assert work == [ONE_HASH] * 2


async def test_whoever_is_not_let_in_can_t_tell_why(
    users: UserServiceStub, ada: User, work: list[Parameters]
) -> None:
    """Wrong password, unknown, inactive, without a password: one answer, at the cost of one hash each."""
    away = User(email="away@example.org", password=PASSWORD, is_active=False)
    open_door = User(email="open@example.org")
    for user in (away, open_door):
        user.id = (await users.CreateUser(CreateUserRequest(user=user))).id

    for asked in (
        {"id": ada.id, "password": PASSWORD[:-1]},
        {"email": ada.email, "password": PASSWORD + " "},
        {"id": 4711},
        {"email": "nobody@example.org"},
        {"id": away.id},
        {"email": away.email},
        {"id": open_door.id},
        {"id": open_door.id, "password": "nobody's password"},
        {"id": 4711, "password": "nobody's password"},
    ):
        work.clear()
        assert await verified(users, **asked) == VerifyPasswordResponse()
        assert work == [ONE_HASH]


async def test_a_password_can_be_changed(users: UserServiceStub, ada: User) -> None:
    """The new one is valid from then on, and the old one is not."""
    changed = await users.UpdateUser(UpdateUserRequest(user=User(id=ada.id, password="new")))

    assert changed.version == 2
    assert (await verified(users, id=ada.id)).valid is False
    assert (await verified(users, id=ada.id, password="new")).user == changed


async def test_a_change_of_every_field_leaves_the_password(users: UserServiceStub, ada: User) -> None:
    """`*` writes it only where one is set."""
    user = User(id=ada.id, email=ada.email, is_active=True)
    request = UpdateUserRequest(user=user, update_mask=FieldMask(paths=["*"]))
    await users.UpdateUser(request)
    assert (await verified(users, id=ada.id)).valid is True

    request.user.password = "new"
    await users.UpdateUser(request)
    assert (await verified(users, id=ada.id, password="new")).valid is True


async def test_a_weak_hash_is_replaced_after_success(server: Server, users: UserServiceStub) -> None:
    """Not after a failure; neither version nor time change, and the password stays."""
    weak = WEAK.hash(PASSWORD)
    user = User(email="ada@example.org", hashed_password=weak)
    ada = await users.CreateUser(CreateUserRequest(user=user))

    await verified(users, id=ada.id, password="wrong")
    assert await stored_hash(server, ada.id) == weak

    assert (await verified(users, id=ada.id)).user == ada
    stronger = await stored_hash(server, ada.id)
    assert stronger != weak
    assert PasswordHasher().check_needs_rehash(stronger) is False

    assert (await verified(users, id=ada.id)).user == ada
    assert await stored_hash(server, ada.id) == stronger
    assert await users.GetUser(GetUserRequest(id=ada.id)) == ada


async def test_a_password_is_stored_as_an_argon2id_hash(server: Server, users: UserServiceStub) -> None:
    """Each with a salt of its own."""
    ids = [
        (await users.CreateUser(CreateUserRequest(user=User(email=email, password=PASSWORD)))).id
        for email in ("ada@example.org", "alan@example.org")
    ]

    first, second = [await stored_hash(server, id) for id in ids]
    assert first.startswith("$argon2id$v=19$")
    assert first != second


async def test_neither_a_password_nor_its_hash_is_ever_shown(server: Server, users: UserServiceStub) -> None:
    """Whatever is called, and whatever came in."""
    user = User(email="ada@example.org", hashed_password=WEAK.hash(PASSWORD))
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


async def test_too_many_passwords_at_once_are_refused(
    server: Server, users: UserServiceStub, ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To check or to set: the call may be tried again, and works once there is room."""
    loop = asyncio.get_running_loop()
    begun, may_end = asyncio.Event(), threading.Event()

    def slow(stored: str, password: str) -> bool:
        loop.call_soon_threadsafe(begun.set)
        return may_end.wait(60)

    monkeypatch.setattr(server.passwords, "_matches", slow)
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
