"""Export active users as CSV. If the stream breaks, it resumes after the last id that was written."""

import asyncio
import csv
import os
import sys

from roster.client import Backoff, RosterError, channel
from roster.v1.users_pb2 import ExportUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub

ADDRESS = os.environ.get("ROSTER_ADDRESS", "127.0.0.1:50051")


async def main() -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(["id", "email", "full_name"])
    backoff = Backoff()
    last_id = 0
    async with channel(ADDRESS) as connection:
        users = UserServiceStub(connection)
        while True:
            request = ExportUsersRequest(filter="is_active = true", after_id=last_id)
            try:
                async for response in users.ExportUsers(request):
                    writer.writerows([user.id, user.email, user.full_name] for user in response.users)
                    last_id = response.last_id
                    backoff.reset()
            except RosterError as error:
                await backoff.wait(error)  # raises the error, if retrying can't help
            else:
                return


if __name__ == "__main__":
    try:
        asyncio.run(main())
        sys.stdout.flush()
    except BrokenPipeError:  # a reader such as `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
