"""The engine and the version of a server that speaks PostgreSQL's protocol."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from service.db.capabilities import citus
from service.db.capabilities.scratch import close, open_connection
from service.db.schema import ReadOnlyDatabase

# In `version()`, which engines that speak PostgreSQL's protocol mention themselves.
ENGINES = {
    "CockroachDB": "CockroachDB",
    "-YB-": "YugabyteDB",
    "Redshift": "Redshift",
    "Greenplum": "Greenplum",
    "EnterpriseDB": "EDB Postgres",
    "Materialize": "Materialize",
    "CrateDB": "CrateDB",
    "QuestDB": "QuestDB",
}
# Aurora's `version()` is PostgreSQL's; it has a function of its own. Citus is an extension.
IS_AURORA = "SELECT count(*) FROM pg_proc WHERE proname = 'aurora_version'"
LEFTOVERS = "SELECT nspname FROM pg_namespace WHERE starts_with(nspname, 'roster_probe_') ORDER BY nspname"
READ_ONLY = "the database is read-only: it is a standby, or default_transaction_read_only is on"
TESTED_VERSIONS = range(14, 19)


@dataclass(frozen=True)
class Server:
    """The description of a server; `leftovers` are the schemas that probes have not dropped."""

    description: str
    is_tested: bool
    leftovers: Sequence[str]
    has_citus: bool = False


async def describe_server(url: str) -> Server:
    """Describe a server; raises ReadOnlyDatabase if it can't be written, and the driver's errors."""
    driver = await open_connection(url)
    try:
        version = await driver.fetchval("SELECT version()")
        number = (await driver.fetchval("SHOW server_version")).partition(" ")[0]
        if await driver.fetchval("SHOW transaction_read_only") == "on":
            raise ReadOnlyDatabase(READ_ONLY)
        name = next((name for mark, name in ENGINES.items() if mark in version), "")
        if not name and await driver.fetchval(IS_AURORA):
            name = "Aurora"
        citus_version = await driver.fetchval(citus.VERSION)
        leftovers = [row[0] for row in await driver.fetch(LEFTOVERS)]
    finally:
        await close(driver)
    if name:
        return Server(f"{name}, compatible with PostgreSQL {number} ({version})", False, leftovers)
    major = int(re.sub("[^0-9].*", "", number) or 0)
    is_tested = major in TESTED_VERSIONS
    if not citus_version:
        return Server(f"PostgreSQL {number}", is_tested, leftovers)
    is_tested &= citus_version.startswith(citus.TESTED_VERSIONS)
    return Server(f"PostgreSQL {number} with Citus {citus_version}", is_tested, leftovers, has_citus=True)
