"""Users read back through the API."""

from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceAsyncStub


async def list_users(users: UserServiceAsyncStub) -> list[User]:
    """Return all users, at most 1,000, in the order of their ids."""
    page = await users.ListUsers(ListUsersRequest(page_size=1000))
    assert not page.next_page_token, "the test has more users than one page holds"
    return list(page.users)


async def list_names(users: UserServiceAsyncStub) -> list[str]:
    """Return the part of each e-mail address before "@", in the order of the ids."""
    return [user.email.partition("@")[0] for user in await list_users(users)]
