"""Load many users. Kill it at any time and run it again: it resumes, and each row is written once.

A load is resumed by its load_id. The rows must come again in the same order; BulkLoader skips those that the
server has already settled.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing

from roster.client import BulkLoader, LoadInterrupted, channel
from roster.v1.bulk_pb2 import BulkAck, BulkOpened, BulkOptions, BulkSummary
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import BulkCreateUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub

ADDRESS = os.environ.get("ROSTER_ADDRESS", "127.0.0.1:50051")
LOAD_ID = "example-2026-03"
INVALID_ROW = 7


async def rows(count: int) -> AsyncIterator[User]:
    """Yield users; one has an invalid e-mail, which fails only its own row."""
    for number in range(count):
        email = "not an e-mail" if number == INVALID_ROW else f"example{number}@example.org"
        yield User(email=email, full_name=f"User {number}")


async def main(count: int) -> None:
    async with channel(ADDRESS) as connection:
        method = UserServiceStub(connection).BulkCreateUsers
        options = BulkOptions(load_id=LOAD_ID)
        loader = BulkLoader(method, BulkCreateUsersRequest, options, batch_rows=500)
        try:
            async with aclosing(loader.run(rows(count))) as events:
                async for event in events:
                    if isinstance(event, BulkOpened):
                        print(f"starting at row {event.next_offset}", flush=True)
                    elif isinstance(event, BulkAck):
                        for failure in event.failures:
                            print(f"row {failure.offset} failed: {failure.message}")
                        print(f"{event.next_offset} rows committed", flush=True)
                    elif isinstance(event, BulkSummary):
                        print(f"finished: {event.created} created, {event.failed} failed")
        except LoadInterrupted as failure:
            sys.exit(f"stopped after {failure.acknowledged} rows: {failure.message}; run it again to resume")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000))
