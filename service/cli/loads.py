"""`roster loads`: list, show, abort and undo named bulk loads."""

import asyncio
import shutil
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import click
import orjson
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from roster.client import pages
from roster.errors import RosterError
from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceAsyncStub, BulkServiceStub
from service.cli.table import fit
from service.cli.terminal import PAGE_SIZE, Target, UsageError, echo, echo_text, server_options
from service.cli.undo import undo
from service.escape import escape

ROW = "{state:8}  {rows:>13}  {failed:>11}  {changed:19}  {method:15}  {caller:20}  {load}"
COLUMNS = ("state", "rows", "failed", "changed", "method", "caller", "load")
# On a terminal, the first that fits.
LAYOUTS = (
    COLUMNS,
    ("state", "rows", "failed", "changed", "caller", "load"),
    ("state", "rows", "failed", "age", "caller", "load"),
    ("state", "rows", "failed", "age", "load"),
    ("state", "rows", "age", "load"),
    ("state", "load"),
)
NUMBERS = frozenset({"rows", "failed", "age"})
UNITS = (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1))
NAME_WIDTH = 11
FORCE = "Undo: delete also rows that have changed since the load, and users with all their posts."
CALLER = "For admins: only loads that this caller started."


@click.command()
@click.argument("action", type=click.Choice(["list", "show", "abort", "undo"]), default="list")
@click.argument("load_id", default="")
@server_options
@click.option("--caller", default="", help=CALLER)
@click.option("--yes", is_flag=True, help="Abort or undo without asking.")
@click.option("--dry-run", is_flag=True, help="Print what `undo` would delete, and delete nothing.")
@click.option("--force", is_flag=True, help=FORCE)
@click.option("--json", "is_json", is_flag=True, help="Print JSON, one object per line.")
def loads(
    action: str,
    load_id: str,
    target: Target,
    caller: str,
    *,
    yes: bool,
    dry_run: bool,
    force: bool,
    is_json: bool,
) -> None:
    """List bulk loads, newest first; show one with its failures; abort one; or undo one.

    `roster load` prints the LOAD_ID of a load with failures. An aborted load accepts no more rows. The rows
    already written stay.

    `undo` deletes the rows that a load created, except for rows that have changed since and users who have
    posts. It prints what would be deleted, and asks. To continue one that was stopped, run the same command
    again.

    A load belongs to the caller who started it. Admins see the loads of all callers. Without --caller,
    `show`, `abort` and `undo` use the admin's own load of that name, or else the only one of that name.

    The exit status is 0 if this worked, 1 if a load was not aborted or rows were kept, otherwise 2.
    """
    if (action == "list") == bool(load_id):
        raise click.UsageError(
            "run `roster loads`, or `roster loads show LOAD_ID`, `abort LOAD_ID` or `undo LOAD_ID`"
        )
    if action == "undo":
        sys.exit(
            undo(target, load_id, caller, is_forced=force, is_dry=dry_run, asks=not yes, is_json=is_json)
        )
    if dry_run or force:
        raise click.UsageError("--dry-run and --force are for `roster loads undo`")
    if action == "abort" and not yes:
        owner = f" of {escape(caller)}" if caller else ""
        click.confirm(f"Abort load {escape(load_id)}{owner}? It can't be resumed.", abort=True, err=True)
    try:
        asyncio.run(_run(target, action, load_id, caller, is_json=is_json))
    except RosterError as failure:
        hint = "; name one with --caller" if failure.field == "caller" else ""
        raise UsageError(target.explain(failure) + hint) from None


async def _run(target: Target, action: str, load_id: str, caller: str, *, is_json: bool) -> None:
    async with target.channel() as connection:
        stub = BulkServiceStub(connection)
        if action == "list":
            await _list(stub, caller, is_json=is_json)
        elif action == "show":
            await _show(stub, load_id, caller, is_json=is_json)
        else:
            load = await stub.AbortBulkLoad(pb.AbortBulkLoadRequest(load_id=load_id, caller=caller))
            if load.state != pb.BulkLoad.ABORTED:
                state = pb.BulkLoad.State.Name(load.state).lower()
                raise click.ClickException(f"the load is already {state} and can't be aborted")
            _print_load(load, is_json=is_json)


async def _list(stub: BulkServiceAsyncStub, caller: str, *, is_json: bool) -> None:
    found = pages(stub.ListBulkLoads, pb.ListBulkLoadsRequest(page_size=PAGE_SIZE, caller=caller))
    if is_json:
        await _print_all(found, _json)
    elif sys.stdout.isatty():
        now = datetime.now(UTC)
        cells = [_cells(load, now) async for load in found]
        echo(*fit(cells, LAYOUTS, shutil.get_terminal_size().columns, NUMBERS))
    else:
        header = ROW.format(**dict(zip(COLUMNS, COLUMNS, strict=True)))
        await _print_all(found, lambda load: ROW.format(**_cells(load, datetime.now(UTC))), header)


async def _show(stub: BulkServiceAsyncStub, load_id: str, caller: str, *, is_json: bool) -> None:
    load = await stub.GetBulkLoad(pb.GetBulkLoadRequest(load_id=load_id, caller=caller))
    _print_load(load, is_json=is_json)
    request = pb.ListBulkLoadFailuresRequest(load_id=load_id, caller=caller, page_size=PAGE_SIZE)
    await _print_all(pages(stub.ListBulkLoadFailures, request), _json if is_json else _failure_line)


async def _print_all(
    messages: AsyncGenerator[Any], format_line: Callable[[Any], str], header: str = ""
) -> None:
    async with aclosing(messages):
        # The first page is fetched before the header is printed: an error prints nothing but itself.
        message = await anext(messages, None)
        if header:
            echo(header)
        while message is not None:
            if header or format_line is _json:
                echo(format_line(message))
            else:
                echo_text(format_line(message), indent=2)
            message = await anext(messages, None)


def _print_load(load: pb.BulkLoad, *, is_json: bool) -> None:
    if is_json:
        echo(_json(load))
    else:
        echo_text(*_details(load), indent=NAME_WIDTH + 2)


def _json(message: Message) -> str:
    return MessageToJson(
        message, preserving_proto_field_name=True, indent=None, always_print_fields_with_no_presence=True
    )


def _cells(load: pb.BulkLoad, now: datetime) -> dict[str, str]:
    changed = load.updated_at.ToDatetime(UTC)
    return {
        "state": pb.BulkLoad.State.Name(load.state),
        "rows": f"{load.next_offset:,}",
        "failed": f"{load.failed:,}",
        "changed": f"{changed:%Y-%m-%d %H:%M:%S}",
        "age": _age((now - changed).total_seconds()),
        "method": load.method.rpartition(".")[2],
        "caller": escape(load.caller),
        "load": escape(load.load_id),
    }


def _age(seconds: float) -> str:
    """Return how long ago something was, such as `3h`; clocks may differ."""
    for unit, size in UNITS:
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return "0s"


def _details(load: pb.BulkLoad) -> list[str]:
    values = orjson.loads(_json(load))
    values["options"] = MessageToJson(load.options, preserving_proto_field_name=True, indent=None)
    names = [field.name for field in load.DESCRIPTOR.fields]
    return [f"{name:{NAME_WIDTH}}  {values.get(name, '')}" for name in names]


def _failure_line(failure: pb.RowFailure) -> str:
    reason = f"{failure.reason} {failure.field}".rstrip()
    return f"offset {failure.offset:,}: {reason}: {failure.message}"
