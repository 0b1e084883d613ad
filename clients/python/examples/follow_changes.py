"""Print the changes of users as they happen. Stop it and run it again: it continues where it was.

The token is stored after the changes that it stands for, so none is lost; one may be printed twice.
"""

import asyncio
import os
import sys
from contextlib import aclosing
from pathlib import Path

from roster.client import FeedReset, RosterError, TokenExpired, channel, watch_changes
from roster.v1.changes_pb2 import Change

ADDRESS = os.environ.get("ROSTER_ADDRESS", "127.0.0.1:50051")


def describe(change: Change) -> str:
    """Return a line for a change of a user."""
    if change.HasField("user"):
        return f"user {change.user.id}: {change.user.email}, version {change.user.version}"
    return f"user {change.deleted_user_id} was deleted"


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def store(path: Path, token: str) -> None:
    """Replace the token; a program that is killed here leaves the old one or the new one."""
    new = path.with_suffix(".new")
    new.write_text(token)
    new.replace(path)


async def main(path: Path) -> None:
    token = read(path)
    async with channel(ADDRESS) as connection:
        try:
            async with aclosing(watch_changes(connection, token, [Change.USERS])) as responses:
                async for response in responses:
                    for change in response.changes:
                        print(describe(change), flush=True)
                    store(path, response.token)
        except (FeedReset, TokenExpired) as error:
            sys.exit(f"changes may be missing: {error.message}; remove {path} to begin again")
        except RosterError as error:
            sys.exit(f"{error.reason}: {error.message}")


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1] if len(sys.argv) > 1 else "token")))
