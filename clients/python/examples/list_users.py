"""List users that match a filter. Pages are fetched on demand, as the loop reaches them."""

import asyncio
import os
import sys

from roster.client import InvalidFilter, channel, pages
from roster.v1.users_pb2 import ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub

ADDRESS = os.environ.get("ROSTER_ADDRESS", "127.0.0.1:50051")


async def main(filter_: str) -> None:
    request = ListUsersRequest(filter=filter_, order_by="email", page_size=100)
    async with channel(ADDRESS) as connection:
        users = UserServiceStub(connection)
        try:
            async for user in pages(users.ListUsers, request):
                print(user.id, user.email)
        except InvalidFilter as error:
            sys.exit(f"invalid filter: {error.message}")


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else ""))
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
