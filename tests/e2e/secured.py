"""A server with TLS and a policy, and what its callers need."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2
from sqlalchemy import func, select

from roster.client import tls_credentials
from service.db.answers import Request
from service.loads.model import Load
from service.server import Server
from service.users.model import User
from tests.e2e.clients import CHECKOUT, Grpcurl
from tests.support.authority import DAY, Authority, Pair
from tests.support.issuer import AUDIENCE, ISSUER, Issuer
from tests.support.server import serve

POLICY = """
[identities]
"jwt:reader" = ["reader"]
"jwt:writer" = ["reader", "writer"]
"jwt:loader" = ["loader"]
"jwt:importer" = ["loader"]
"jwt:deleter" = ["deleter"]
"jwt:cleaner" = ["reader", "deleter"]
"jwt:verifier" = ["verifier"]
"jwt:admin" = ["admin"]
"jwt:support" = ["support"]
"jwt:dismissed" = []
"dns:loads.example.org" = ["loader"]
"spiffe://example.org/prod/*" = ["reader"]
"spiffe://example.org/prod/loads" = ["loader"]

[roles]
support = ["roster.v1.UserService/GetUser", "roster.v1.UserService/BulkCreateUsers"]
"""
# Read from files, so that who is refused is refused for the call itself and not for reflection.
CONTRACT = [
    f"-import-path={CHECKOUT / 'protos'}",
    f"-import-path={Path(error_details_pb2.__file__).parents[2]}",
    *(f"-proto=roster/v1/{name}.proto" for name in ("users", "posts", "bulk")),
    "-proto=google/rpc/error_details.proto",
]


@dataclass(frozen=True)
class Secured:
    """A server on TLS; its files are in `folder`."""

    server: Server
    authority: Authority
    issuer: Issuer
    folder: Path

    @property
    def address(self) -> str:
        return self.server.address

    async def stored(self) -> int:
        """Count the rows that calls could have written."""
        async with self.server.database.read() as session:
            counts = [select(func.count()).select_from(kind) for kind in (User, Load, Request)]
            return sum([await session.scalar(count) or 0 for count in counts])

    def channel(self, token: str | None = None, pair: Pair | None = None) -> grpc.aio.Channel:
        """Return a channel of our own client."""
        named = (pair.key, pair.cert) if pair else (None, None)
        return grpc.aio.secure_channel(
            self.address,
            tls_credentials(self.authority.cert, *named, token=(lambda: token) if token else None),
        )

    def grpcurl(
        self, token: str | None = None, pair: Pair | None = None, *, reflects: bool = False
    ) -> Grpcurl:
        """Return grpcurl, as a person would give it the same."""
        options = [f"-cacert={self.folder / 'ca.pem'}", "-connect-timeout=5", *([] if reflects else CONTRACT)]
        if token:
            options += ["-H", f"authorization: Bearer {token}"]
        if pair:
            (self.folder / "client").mkdir(exist_ok=True)
            cert, key = pair.write(self.folder / "client")
            options += [f"-cert={cert}", f"-key={key}"]
        return Grpcurl(self.address, *options)


@asynccontextmanager
async def secured(
    database_url: str,
    folder: Path,
    *,
    client_ca: bool = False,
    tokens: bool = False,
    name: str = "127.0.0.1",
    valid_for: timedelta = DAY,
    **settings: Any,
) -> AsyncIterator[Secured]:
    """Serve with TLS, and know callers by their certificates, by tokens, or both."""
    authority, issuer = Authority(), Issuer()
    cert, key = authority.issue(name, valid_for=valid_for).write(folder)
    ca, policy = authority.write(folder), folder / "policy.toml"
    policy.write_text(POLICY)
    if client_ca:
        settings["tls_client_ca_file"] = ca
    if tokens:
        settings |= {"jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "jwt_keys_file": issuer.write(folder)}
    settings |= {"tls_cert_file": cert, "tls_key_file": key, "policy_file": policy}
    async with serve(database_url, **settings) as server:
        yield Secured(server, authority, issuer, folder)
