"""`roster count`: count users or posts."""

import asyncio
import json
from typing import Any

import click

from roster.errors import RosterError
from service.cli.rows import ENTITIES, POSTS, Entity
from service.cli.terminal import Integer, Target, UsageError, echo, server_options
from service.validation import DEFAULT_COUNT, MAX_COUNT, MAX_ID

AT_MOST = "Stop counting after this many rows."


@click.command(context_settings={"show_default": True})
@click.argument("entity", type=click.Choice(list(ENTITIES)))
@server_options
@click.option("--filter", "filter_", help="Count only matching rows, such as 'is_active = true'.")
@click.option("--author-id", type=Integer(1, MAX_ID), help="Count only the posts of this user.")
@click.option("--at-most", type=Integer(1, MAX_COUNT), default=DEFAULT_COUNT, help=AT_MOST)
@click.option("--json", "is_json", is_flag=True, help="Print a JSON object with `count` and `is_exact`.")
def count(
    entity: str, target: Target, filter_: str | None, author_id: int | None, at_most: int, *, is_json: bool
) -> None:
    """Count users or posts.

    The count stops after --at-most rows. If there are more, it prints `more than 10,000`.

    The exit status is 0 if the rows were counted, otherwise 2.
    """
    kind = ENTITIES[entity]
    if author_id and kind is not POSTS:
        raise click.UsageError("--author-id is for posts")
    scope = {"author_id": author_id} if author_id else {}
    try:
        counted = asyncio.run(_count(target, kind, filter=filter_, at_most=at_most, **scope))
    except RosterError as failure:
        raise UsageError(target.explain(failure)) from None
    if is_json:
        echo(json.dumps({"count": counted.count, "is_exact": counted.is_exact}))
    else:
        echo(f"{counted.count:,}" if counted.is_exact else f"more than {counted.count:,}")


async def _count(target: Target, kind: Entity, **fields: Any) -> Any:
    async with target.channel() as connection:
        counts, request = kind.rpc(connection, "Count")
        return await counts(request(**fields))
