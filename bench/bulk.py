"""Bulk streams, of Roster and its peers, each next to a reference in the same run."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.cases import Case, Cases
from bench.databases import PostgreSQL, Sqlite, scalar
from bench.measure import Approach, Clock, Run, Thing, expect, start_process, take_turns
from bench.options import Options
from bench.report import Table
from bench.servers import AGAIN, GO, NODE, RAW, ROSTER, TEXTBOOK, available, start_server

TABLES = ("create", "bulk")
COPY = r"\copy"
COPY_AGAIN = r"\copy again"
CASES = ("hashes", "duplicates", "posts", "update", "delete", "sqlite")
LOAD_ID = "bench"  # a named load: the server stores the outcome of every row
SLOW_SHARE = 10  # the ORM gets a tenth of the rows

Store = PostgreSQL | Sqlite


class BulkRuns:
    """Runs cases, each with a new database, server and client."""

    def __init__(
        self, options: Options, folder: Path, postgresql: PostgreSQL, open_templates: AsyncExitStack
    ) -> None:
        self._options = options
        self._folder = folder
        self._stores: dict[str, Store] = {"postgresql": postgresql, "sqlite": Sqlite(folder)}
        self._open_templates = open_templates

    async def create(self) -> Table:
        """Compare all ways to create users."""
        case = self._cases("all", self._options.rows).case("create")
        small = self._cases("some", self._options.rows // SLOW_SHARE).case("create")
        things = {}
        for name in available(ROSTER, AGAIN, GO, NODE, RAW, TEXTBOOK):
            things[name] = await self._thing(small if name == TEXTBOOK else case, name)
        things |= dict.fromkeys((COPY, COPY_AGAIN), await self._thing(case, ""))
        runs = await take_turns("create", things, self._options.rounds)
        return Table("create", f"BulkCreateUsers, {case.result:,} users with hashes", "rows", COPY, runs)

    async def bulk(self) -> Table:
        """Compare the other operations of Roster, each with its own reference."""
        cases = self._cases("cases", self._options.rows)
        things: dict[str, Thing] = {}
        references = {}
        for name in CASES:
            case = cases.case(name)
            reference = f"… {case.reference.name}, {name}"
            references[case.title] = references[reference] = reference
            things[case.title] = await self._thing(case, ROSTER)
            things[reference] = await self._thing(case, "")
        runs = await take_turns("bulk", things, self._options.rounds)
        return Table("bulk", "Other bulk operations of Roster", "rows", "", runs, references=references)

    def _cases(self, folder: str, rows: int) -> Cases:
        (self._folder / folder).mkdir()
        return Cases(self._folder / folder, rows, LOAD_ID)

    async def _thing(self, case: Case, server: str) -> Thing:
        """Return what runs a case through a server, or without one its reference."""
        store = self._stores[case.database]
        template = await self._open_templates.enter_async_context(store.template(case.users))
        approach = case.approach if server else case.reference
        if server in {GO, NODE, RAW, TEXTBOOK}:
            approach = replace(approach, answer=json.dumps(json.loads(approach.answer) | {"ids": 0}))
        return partial(_run, case, approach, server, store, template)


async def _run(case: Case, approach: Approach, server: str, store: Store, template: str) -> Run:
    async with store.database(template) as url:
        run = await asyncio.to_thread(measure, approach, server, url, store.pid)
        result = await scalar(url, case.check)
    if result != case.result:
        raise RuntimeError(f"{case.name}, {approach.name}: {case.check} is {result}, not {case.result}")
    return run


def measure(approach: Approach, server: str, url: str, postmaster: int) -> Run:
    """Measure an approach through a server, or without one straight into the database."""
    with ExitStack() as processes:
        pid, target = 0, url
        if server:
            started = processes.enter_context(start_server(server, url))
            pid, target = started.pid, started.address
        client = processes.enter_context(start_process(*approach.command, target))
        expect("ready", client, approach.greeting)
        clock = Clock(server=pid, postgresql=postmaster, client=client.pid)
        expect(approach.answer, client, approach.script)
        return clock.stop(approach.rows)


async def run(
    options: Options, names: Iterable[str], folder: Path, postgresql: PostgreSQL
) -> AsyncIterator[Table]:
    """Yield the tables of these names."""
    for name in names:
        async with AsyncExitStack() as open_templates:
            runs = BulkRuns(options, folder, postgresql, open_templates)
            yield await getattr(runs, name)()
