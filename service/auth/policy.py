"""Authorisation: identities have roles, roles allow RPCs, and everything else is denied."""

import re
import tomllib

from pydantic import BaseModel

from service import services
from service.auth.caller import ANONYMOUS_IDENTITY, NOBODY, Caller

# The role that an RPC needs follows from its name; the first prefix that fits decides.
ROLES_BY_PREFIX = {
    "reader": ("Get", "BatchGet", "List", "Count", "Export", "Watch"),
    "writer": ("Create", "Update", "Delete"),
    "deleter": ("BulkDelete",),
    "loader": ("Bulk",),
}
# These RPCs need other roles than their names suggest, or have another verb.
LOADS = ("loader", "deleter")
EXCEPTIONS = {
    "/roster.v1.UserService/VerifyPassword": ("verifier",),
    "/roster.v1.BulkService/GetBulkLoad": LOADS,
    "/roster.v1.BulkService/ListBulkLoads": LOADS,
    "/roster.v1.BulkService/ListBulkLoadFailures": LOADS,
    "/roster.v1.BulkService/ListBulkLoadRows": LOADS,
    "/roster.v1.BulkService/AbortBulkLoad": LOADS,
}


def roles_of(rpc: str) -> tuple[str, ...]:
    """Return the built-in roles that allow an RPC besides `admin`.

    No role allows an RPC with an unknown verb, and nobody can call it, until EXCEPTIONS names it.
    """
    if rpc in EXCEPTIONS:
        return EXCEPTIONS[rpc]
    name = rpc.rpartition("/")[2]
    for role, prefixes in ROLES_BY_PREFIX.items():
        if name.startswith(prefixes):
            return (role,)
    return ()


def _roles() -> dict[str, frozenset[str]]:
    """Return the RPCs that each built-in role allows."""
    roles: dict[str, set[str]] = {}
    for rpc in services.RPCS:
        for role in roles_of(rpc):
            roles.setdefault(role, set()).add(rpc)
    return {role: frozenset(rpcs) for role, rpcs in roles.items()}


def _methods(service: str, *names: str) -> frozenset[str]:
    return frozenset(f"/{service}/{name}" for name in names)


ROLES = _roles()
RPCS = frozenset().union(*ROLES.values())
ROLES["admin"] = RPCS

# A view or an answer that shows more than its RPC requires the right to call these, and so does a create that
# may update.
GET_USER = "/roster.v1.UserService/GetUser"
UPDATE_USER = "/roster.v1.UserService/UpdateUser"
GET_POST = "/roster.v1.PostService/GetPost"
LIST_POSTS = "/roster.v1.PostService/ListPosts"

# Probes have no credentials.
HEALTH = _methods("grpc.health.v1.Health", "Check", "List", "Watch")
# Every caller that has a role may use reflection.
REFLECTION = _methods("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo") | _methods(
    "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"
)

ANONYMOUS = Caller(ANONYMOUS_IDENTITY, frozenset(ROLES), RPCS | REFLECTION)

WILDCARD = "*"
IDENTITY = re.compile(r"jwt:.+|dns:[^A-Z]+|spiffe://[^*]+/(?:[^*/]+|\*)")


class PolicyFile(BaseModel, extra="forbid", strict=True):
    """The policy file, in TOML."""

    identities: dict[str, list[str]]
    roles: dict[str, list[str]] = {}


class Policy:
    """The roles of identities; raises ValueError for an unknown role, RPC or kind of identity."""

    def __init__(self, file: PolicyFile) -> None:
        roles = {**ROLES, **{name: _custom_role(name, rpcs) for name, rpcs in file.roles.items()}}
        self._entries = {name: _entry(name, names, roles) for name, names in file.identities.items()}

    @classmethod
    def read(cls, data: bytes) -> "Policy":
        """Return the policy in a file's content."""
        return cls(PolicyFile.model_validate(tomllib.loads(data.decode())))

    def caller(self, identity: str) -> Caller:
        """Return an identity with its roles: of its own entry, or of the longest matching `/*`."""
        names = [identity]
        if identity.startswith("spiffe://"):
            slashes = [at for at, letter in enumerate(identity) if letter == "/"]
            names += [identity[: at + 1] + WILDCARD for at in reversed(slashes)]
        entry = next((self._entries[name] for name in names if name in self._entries), NOBODY)
        return Caller(identity, entry.roles, entry.rpcs)


def _custom_role(name: str, rpcs: list[str]) -> frozenset[str]:
    if name in ROLES:
        raise ValueError(f"the role {name} is built in and can't be redefined")
    methods = frozenset(f"/{rpc}" for rpc in rpcs)
    if unknown := methods - RPCS:
        raise ValueError(f"the role {name} names unknown RPCs: {', '.join(sorted(unknown))}")
    return methods


def _entry(name: str, roles: list[str], known: dict[str, frozenset[str]]) -> Caller:
    if not IDENTITY.fullmatch(name):
        raise ValueError(
            f"{name} is not an identity; write jwt:SUBJECT, dns:name, spiffe://domain/path or …/*"
        )
    if unknown := set(roles) - known.keys():
        raise ValueError(f"{name} has unknown roles: {', '.join(sorted(unknown))}")
    rpcs = frozenset().union(*(known[role] for role in roles))
    has = frozenset(known if "admin" in roles else roles)
    return Caller(name, has, rpcs | REFLECTION if roles else rpcs)
