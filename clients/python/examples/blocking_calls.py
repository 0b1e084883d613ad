"""The client without asyncio: make sure that a user exists, and list users. For scripts and WSGI services."""

import os
import sys

from roster.client import RosterError, blocking
from roster.v1.bulk_pb2 import BulkOptions
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest, ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub

ADDRESS = os.environ.get("ROSTER_ADDRESS", "127.0.0.1:50051")


def user_of(users: UserServiceStub, email: str) -> User:
    """Return the user with an e-mail, who is created if there is none."""
    request = CreateUserRequest(user=User(email=email), on_conflict=BulkOptions.SKIP)
    return users.CreateUser(request, timeout=2)


def main() -> None:
    with blocking.channel(ADDRESS) as connection:
        users = UserServiceStub(connection)
        user = user_of(users, "grace@example.org")
        print(f"{user.email} is user {user.id}")
        for other in blocking.pages(users.ListUsers, ListUsersRequest(filter='email : "@example.org"')):
            print(other.id, other.email)


if __name__ == "__main__":
    try:
        main()
    except RosterError as error:
        sys.exit(f"{error.reason}: {error.message}")
