"""The part of `roster doctor` about the hosts of database URLs, each of which is asked by itself."""

from collections.abc import Mapping

import asyncpg
from sqlalchemy.exc import DBAPIError

from service.cli.probe import Report
from service.consistency import Position
from service.db import conninfo
from service.db.connect import connect
from service.db.engine import Database
from service.db.errors import NoUsableHost, cause_of, short_cause
from service.db.pooler import REPLICA_NEEDS_SESSION, pooler_mode
from service.db.replica import PROBE, Identity
from service.settings import Settings
from service.variables import environment

FAILURES = (OSError, DBAPIError, asyncpg.PostgresError, asyncpg.InterfaceError)
STANDBY_FIRST = ("standby", "prefer-standby")


async def check_primary(settings: Settings, report: Report) -> None:
    """Report hosts of ROSTER_DATABASE_URL that do not answer, and more than one that accepts writes."""
    hosts = [*conninfo.each_host(conninfo.read(settings.database_url, environment()))]
    if len(hosts) == 1 or settings.pools_transactions:
        return
    primaries = []
    for name, one in hosts:
        try:
            server, _ = await _probe(one, settings.connect_timeout)
        except FAILURES as error:
            report.warn("database", f"{name}: {_cause(error)}")
        else:
            if not server.is_replica:
                primaries.append(f"{name} (timeline {server.timeline})")
    if len(primaries) > 1:
        report.fail(
            "database",
            f"{' and '.join(primaries)} accept writes; stop all but the one with the last timeline, and make "
            "the others its standbys",
        )


async def check_replicas(database: Database, settings: Settings, report: Report) -> None:
    """Report whether each replica answers, belongs to the database, and keeps its sessions, and its lag.

    One that does not answer is a warning: the server works without it.
    """
    if database.replica is None or settings.replica_url is None:
        return
    primary = await database.replica.primary.current(settings.connect_timeout)
    if primary is None:
        report.fail(
            "replica",
            "the position of the primary can't be read, so no replica is used; the role needs to execute "
            "pg_current_wal_insert_lsn(), pg_walfile_name() and pg_control_system()",
        )
        return
    parameters = conninfo.read(settings.replica_url, environment())
    wants_standby = parameters.get("target_session_attrs") in STANDBY_FIRST
    for name, one in conninfo.each_host(parameters):
        try:
            if await pooler_mode(one, settings.connect_timeout) == "transaction":
                report.fail("replica", f"{name} {REPLICA_NEEDS_SESSION}")
                continue
            server, lsn = await _probe(one, settings.connect_timeout)
        except FAILURES as error:
            report.warn("replica", f"{name}: {_cause(error)}; reads go to the primary")
        else:
            if wants_standby and not server.is_replica and server.timeline == primary.timeline:
                report.ok("replica", f"{name} is the primary; reads use the standbys of the URL")
            else:
                _report(name, server, lsn, primary, report)


async def _probe(parameters: Mapping[str, str], timeout: float) -> tuple[Identity, int | None]:
    """Return the server of a host, and the position that it has reached, None if its replay is paused."""
    any_server = {**parameters, "target_session_attrs": "any"}
    connection = await connect(any_server, timeout=timeout, command_timeout=timeout)
    try:
        *identity, lsn = await connection.fetchrow(str(PROBE))
        server = Identity(*identity)
        is_paused = server.is_replica and await connection.fetchval("SELECT pg_is_wal_replay_paused()")
    finally:
        connection.terminate()
    return server, None if is_paused else lsn


def _cause(error: Exception) -> str:
    """Return why a host can't be used, without its name."""
    if isinstance(error, NoUsableHost) and error.__cause__:
        return short_cause(error.__cause__)
    return cause_of(error)


def _report(name: str, server: Identity, lsn: int | None, primary: Position, report: Report) -> None:
    if server.cluster != primary.cluster:
        report.fail("replica", f"{name} is not a replica of the database in ROSTER_DATABASE_URL")
    elif not server.is_replica and server.timeline > primary.timeline:
        report.fail(
            "replica",
            f"{name} was promoted, and has a later timeline than the server that ROSTER_DATABASE_URL leads "
            "to; stop that one, or it keeps writes that the new primary does not have",
        )
    elif not server.is_replica and server.timeline != primary.timeline:
        report.fail("replica", f"{name} was promoted, and no longer follows the primary; make it a standby")
    elif not server.is_replica:
        report.warn("replica", f"{name} is the primary; name its standbys in ROSTER_REPLICA_URL")
    elif server.timeline != primary.timeline:
        report.warn("replica", f"{name} shows an older timeline than the primary's; see docs/operating.md")
    elif lsn is None:
        report.warn("replica", f"{name} has paused its replay; run SELECT pg_wal_replay_resume() there")
    else:
        report.ok("replica", f"{name} is {max(primary.lsn - lsn, 0):,} bytes behind the primary")
