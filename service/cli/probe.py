"""`roster doctor --database`: try the capabilities that Roster needs from the database."""

import sqlite3
from typing import Any, Protocol

import asyncpg

from service.cli.migrate import connection_problem
from service.db.capabilities import citus, postgresql, sqlite
from service.db.capabilities.capability import Capability
from service.db.capabilities.scratch import LeftBehind, NoScratchSchema, left_behind, scratch_schema
from service.db.capabilities.server import describe_server
from service.db.sqlite_files import sqlite_path, storage_problem
from service.settings import Settings

SUBJECT = "engine"


class Report(Protocol):
    """The receiver of the results."""

    def ok(self, subject: str, text: str) -> None: ...

    def warn(self, subject: str, text: str) -> None: ...

    def fail(self, subject: str, problem: str) -> None: ...


async def probe(settings: Settings, report: Report) -> None:
    """Try each capability in a scratch schema, or in files next to a SQLite database, and report it.

    It connects as `roster migrate` does, because the role of the service may create nothing.
    """
    if settings.is_embedded:
        _probe_sqlite(settings.database_url, report)
        return
    setting = "ROSTER_MIGRATION_URL" if settings.migration_url else "ROSTER_DATABASE_URL"
    try:
        await _probe_postgresql(settings.direct_url, report)
    except (NoScratchSchema, LeftBehind) as error:
        report.fail(SUBJECT, str(error))
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
        report.fail(SUBJECT, connection_problem(error, setting))


async def _probe_postgresql(url: str, report: Report) -> None:
    server = await describe_server(url)
    if server.is_tested:
        report.ok(SUBJECT, server.description)
    else:
        report.warn(SUBJECT, f"{server.description}, on which Roster is not tested")
    for schema in server.leftovers:
        report.warn(SUBJECT, f"{left_behind(schema)}, unless another probe is running")
    if server.has_citus:
        for finding in citus.judge(await citus.read_cluster(url)):
            getattr(report, finding.level)(SUBJECT, finding.text)
    async with scratch_schema(url) as scratch:
        for capability in postgresql.CAPABILITIES:
            _report(capability, await postgresql.problem_of(capability, scratch), report)


def _probe_sqlite(url: str, report: Report) -> None:
    if problem := storage_problem(url):
        report.fail(SUBJECT, problem)
        return
    folder = sqlite_path(url).resolve().parent
    report.ok(SUBJECT, f"SQLite {sqlite3.sqlite_version}, files in {folder}")
    for left in sqlite.leftovers(folder):
        report.warn(SUBJECT, f"{left} was left by a probe, unless another one is running; remove it")
    try:
        with sqlite.scratch_folder(folder) as scratch:
            for capability in sqlite.CAPABILITIES:
                _report(capability, sqlite.problem_of(capability, scratch), report)
    except OSError as error:
        report.fail(SUBJECT, f"nothing was probed, because {folder} can't be written: {error.strerror}")


def _report(capability: Capability[Any], problem: str, report: Report) -> None:
    if not problem:
        report.ok(SUBJECT, capability.name)
        return
    text = f"{capability.name}: {problem}\nneeded for {capability.feature}"
    if capability.is_required:
        report.fail(SUBJECT, text)
    else:
        report.warn(SUBJECT, text)
