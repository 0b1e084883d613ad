"""`roster loads`: what became of the loads that have a name, and how to stop one."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import click
import orjson
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

from roster.v1 import bulk_pb2 as pb
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from service.cli.terminal import PAGE_SIZE, Target, UsageError, echo, server_options
from service.client import pages
from service.errors import RosterError
from service.escape import escape

LINE = "{:8}  {:>13}  {:>11}  {:19}  {:15}  {}"
HEAD = LINE.format("state", "rows", "failed", "changed", "method", "load")


@click.command(short_help="List bulk loads, show one with its failures, or abort one.")
@click.argument("action", type=click.Choice(["list", "show", "abort"]), default="list")
@click.argument("load_id", default="")
@server_options
@click.option("--yes", is_flag=True, help="Abort without a question.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON as grpcurl does, an object a line.")
def loads(action: str, load_id: str, target: Target, *, yes: bool, is_json: bool) -> None:
    """List the bulk loads that have a name, the newest first; show one with its failures; abort one.

    An aborted load takes no more rows; those that are in stay.
    """
    if (action == "list") == bool(load_id):
        raise click.UsageError("write `roster loads`, `roster loads show LOAD_ID` or `… abort LOAD_ID`")
    if action == "abort" and not yes:
        click.confirm(f"Abort the load {escape(load_id)} for good?", abort=True, err=True)
    try:
        asyncio.run(_run(target, action, load_id, is_json=is_json))
    except RosterError as failure:
        raise UsageError(target.explained(failure)) from None


async def _run(target: Target, action: str, load_id: str, *, is_json: bool) -> None:
    async with target.channel() as connection:
        stub = BulkServiceStub(connection)
        if action == "list":
            every = pages(stub.ListBulkLoads, pb.ListBulkLoadsRequest(page_size=PAGE_SIZE))
            await _print_all(every, _json if is_json else _line, "" if is_json else HEAD)
            return
        if action == "abort":
            load = await stub.AbortBulkLoad(pb.AbortBulkLoadRequest(load_id=load_id))
            if load.state != pb.BulkLoad.ABORTED:
                state = pb.BulkLoad.State.Name(load.state).lower()
                raise click.ClickException(f"it is {state}; nothing to abort")
        else:
            load = await stub.GetBulkLoad(pb.GetBulkLoadRequest(load_id=load_id))
        echo(*([_json(load)] if is_json else _story(load)))
        if action == "show":
            request = pb.ListBulkLoadFailuresRequest(load_id=load_id, page_size=PAGE_SIZE)
            await _print_all(pages(stub.ListBulkLoadFailures, request), _json if is_json else _why)


async def _print_all(messages: AsyncGenerator[Any], text: Callable[[Any], str], head: str = "") -> None:
    async with aclosing(messages):
        message = await anext(messages, None)
        if head:
            echo(head)
        while message is not None:
            echo(text(message))
            message = await anext(messages, None)


def _json(message: Message) -> str:
    return MessageToJson(
        message, preserving_proto_field_name=True, indent=None, always_print_fields_with_no_presence=True
    )


def _line(load: pb.BulkLoad) -> str:
    changed = f"{load.updated_at.ToDatetime():%Y-%m-%d %H:%M:%S}"
    state, method = pb.BulkLoad.State.Name(load.state), load.method.rpartition(".")[2]
    return LINE.format(state, f"{load.next_offset:,}", f"{load.failed:,}", changed, method, load.load_id)


def _story(load: pb.BulkLoad) -> list[str]:
    told = orjson.loads(_json(load))
    told["options"] = MessageToJson(load.options, preserving_proto_field_name=True, indent=None)
    names = [field.name for field in load.DESCRIPTOR.fields]
    return [f"{name:11}  {told.get(name, '')}" for name in names]


def _why(failure: pb.RowFailure) -> str:
    return f"offset {failure.offset:,}: {failure.reason} {failure.field}: {failure.message}"
