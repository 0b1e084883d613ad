"""Create, read and update a user, and handle the errors that a program can act on."""

import asyncio
import os
import sys
from uuid import uuid4

from roster.client import (
    DeadlineExceeded,
    EmailTaken,
    RosterError,
    Unavailable,
    UserNotFound,
    VersionMismatch,
    channel,
)
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest, GetUserRequest, UpdateUserRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub, UserServiceStub

ADDRESS = os.environ.get("ROSTER_ADDRESS", "127.0.0.1:50051")


async def create(users: UserServiceAsyncStub, email: str, request_id: str) -> str:
    """Create a user. Calls with the same request_id create it once and get the same response."""
    request = CreateUserRequest(user=User(email=email, full_name="Ada Lovelace"), request_id=request_id)
    try:
        user = await users.CreateUser(request)
    except EmailTaken as error:
        return f"user {error.facts['existing_id']} already has this e-mail"
    return f"created user {user.id}, version {user.version}"


async def rename(users: UserServiceAsyncStub, email: str, name: str) -> str:
    """Rename a user, unless somebody else changes it between the read and the update."""
    try:
        user = await users.GetUser(GetUserRequest(email=email), timeout=2)
        update = User(id=user.id, full_name=name, version=user.version)
        updated = await users.UpdateUser(UpdateUserRequest(user=update))
    except UserNotFound:
        return f"nobody has the e-mail {email}"
    except VersionMismatch:
        return "somebody else changed the user: read it again, then decide"
    except (Unavailable, DeadlineExceeded):
        return "the server is not available, in spite of retries"
    except RosterError as error:
        return f"{error.reason}: {error.message}"
    return f"{updated.full_name}, version {updated.version}"


async def main() -> None:
    request_id = str(uuid4())
    email = f"ada-{uuid4()}@example.org"  # a new one, so that each run creates a user
    async with channel(ADDRESS) as connection:
        users = UserServiceStub(connection)
        print(await create(users, email, request_id))
        print(await create(users, email, request_id))
        print(await create(users, email, str(uuid4())))
        print(await rename(users, email, "Ada King"))
        print(await rename(users, f"nobody-{email}", "Nobody"))


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except RosterError as error:
        sys.exit(f"{error.reason}: {error.message}")
