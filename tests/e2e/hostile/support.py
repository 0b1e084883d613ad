"""A server to attack, with TLS, tokens and a policy, and a caller who reads meanwhile."""

import asyncio
import json
import math
import os
import re
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import grpc

from roster.client import tls_credentials
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import CreateUserRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from tests.e2e.clients import CHECKOUT
from tests.e2e.secured import POLICY
from tests.support.authority import Authority
from tests.support.command import Serving, serving
from tests.support.issuer import AUDIENCE, ISSUER, Issuer

# `make test-hostile` makes each attack this many times as large, or as long.
SCALE = int(os.environ.get("ROSTER_TEST_SCALE", "1"))
MEMORY_RETURNS_SECONDS = 30
PROMPT_SECONDS = 0.5  # allowed whatever the rest is: two cores run server, attacker and bystander
MIB = 1 << 20


@dataclass(frozen=True)
class Victim:
    """A `roster serve` in its own process; the identities are those of `tests/e2e/secured.py`."""

    process: Serving
    folder: Path
    issuer: Issuer

    @property
    def address(self) -> str:
        return self.process.address

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def token(self, subject: str) -> str:
        """Return a token for an identity of the policy, such as "reader" or "admin"."""
        return self.issuer.token(subject)

    def channel(self, subject: str | None = None, **options: Any) -> grpc.aio.Channel:
        """Return a channel of our client, without a token if there is no subject."""
        token = self.token(subject) if subject else None
        credentials = tls_credentials(self.ca.read_bytes(), token=(lambda: token) if token else None)
        return grpc.aio.secure_channel(self.address, credentials, list(options.items()))

    def resident(self) -> float:
        """Return the current memory of the server in MiB."""
        return self._memory("VmRSS")

    def peak(self) -> float:
        """Return the largest memory of the server since `forget_peak`, in MiB."""
        return self._memory("VmHWM")

    def forget_peak(self) -> None:
        """Restart the measurement of `peak` (proc(5), clear_refs)."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    async def returns_to(self, mib: float) -> bool:
        """Wait until the server is back at an amount of memory, at most 30 s."""
        return await eventually(lambda: self.resident() <= mib, MEMORY_RETURNS_SECONDS)

    def _memory(self, name: str) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        kib = re.search(rf"{name}:\s+(\d+) kB", status)
        assert kib
        return int(kib[1]) / 1024


@asynccontextmanager
async def victim(
    folder: Path, database_url: str, *, reads_log: bool = False, **environment: str
) -> AsyncIterator[Victim]:
    """Serve with TLS, tokens and a policy, and further settings by their environment variables.

    The log is discarded unless the test reads it, because a full pipe would block the server.
    """
    authority, issuer = Authority(), Issuer()
    cert, key = authority.issue("127.0.0.1").write(folder)
    authority.write(folder)
    policy = folder / "policy.toml"
    policy.write_text(POLICY)
    settings = {
        "ROSTER_DATABASE_URL": database_url,
        "ROSTER_TLS_CERT_FILE": str(cert),
        "ROSTER_TLS_KEY_FILE": str(key),
        "ROSTER_JWT_ISSUER": ISSUER,
        "ROSTER_JWT_AUDIENCE": AUDIENCE,
        "ROSTER_JWT_KEYS_FILE": str(issuer.write(folder)),
        "ROSTER_POLICY_FILE": str(policy),
        "ROSTER_LOG_LEVEL": "ERROR",
        **environment,
    }
    async with serving(folder, **settings) as process:
        reading = [] if reads_log else [asyncio.create_task(process.ended())]
        try:
            yield Victim(process, folder, issuer)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)


@dataclass
class Bystander:
    """The calls of a caller who reads one user again and again; set at the end of its block."""

    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def p99(self) -> float:
        """The 99th percentile of the seconds that a call took."""
        return percentile(self.seconds, 0.99)


@asynccontextmanager
async def bystander(victim: Victim, subject: str = "admin") -> AsyncIterator[Bystander]:
    """Let another process read a user every 20 ms on one connection while the block runs."""
    async with victim.channel("admin") as channel:
        request = CreateUserRequest(user=User(email=f"{os.urandom(8).hex()}@example.org"))
        user = await UserServiceStub(channel).CreateUser(request)
    seen = Bystander()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.e2e.hostile.caller"),
        *(victim.address, victim.ca, victim.token(subject), str(user.id)),
        cwd=CHECKOUT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    await process.stdout.readline()
    try:
        yield seen
    finally:
        out, _ = await process.communicate(b"")
        met = json.loads(out)
        seen.seconds, seen.failures = met["seconds"], met["failures"]


async def at_rest(victim: Victim, subject: str = "admin", seconds: float = 1.5) -> float:
    """Return the p99 of a caller while nothing else happens, in seconds."""
    async with bystander(victim, subject) as seen:
        await asyncio.sleep(seconds)
    return seen.p99


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


async def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    """Return whether a condition becomes true within some seconds; check it ten times a second."""
    end = perf_counter() + seconds
    while not (is_true := condition()) and perf_counter() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    return is_true
