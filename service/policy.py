"""Who may do what: from identities to roles, from roles to RPCs, and nothing that is not said here."""

import re
import tomllib

from pydantic import BaseModel

from service.caller import ANONYMOUS_IDENTITY, NOBODY, Caller


def _methods(service: str, names: str) -> frozenset[str]:
    return frozenset(f"/{service}/{name}" for name in names.split())


USERS, POSTS, BULK = "roster.v1.UserService", "roster.v1.PostService", "roster.v1.BulkService"
ROLES = {
    "reader": _methods(USERS, "GetUser BatchGetUsers ListUsers ExportUsers")
    | _methods(POSTS, "GetPost BatchGetPosts ListPosts ExportPosts"),
    "writer": _methods(USERS, "CreateUser UpdateUser DeleteUser")
    | _methods(POSTS, "CreatePost UpdatePost DeletePost"),
    "loader": _methods(USERS, "BulkCreateUsers BulkUpdateUsers")
    | _methods(POSTS, "BulkCreatePosts BulkUpdatePosts")
    | _methods(BULK, "GetBulkLoad ListBulkLoads ListBulkLoadFailures AbortBulkLoad"),
    "verifier": _methods(USERS, "VerifyPassword"),
}
# What a view or the answer of an update shows besides needs the RPC that reads it.
GET_USER, GET_POST, LIST_POSTS = f"/{USERS}/GetUser", f"/{POSTS}/GetPost", f"/{POSTS}/ListPosts"
RPCS = frozenset().union(*ROLES.values())
ROLES["admin"] = RPCS

# For probes, which bring nothing.
HEALTH = _methods("grpc.health.v1.Health", "Check List Watch")
# For everybody who has a role.
REFLECTION = _methods("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo") | _methods(
    "grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo"
)

ANONYMOUS = Caller(ANONYMOUS_IDENTITY, frozenset(ROLES), RPCS | REFLECTION)

WILDCARD = "*"
IDENTITY = re.compile(r"jwt:.+|dns:[^A-Z]+|spiffe://[^*]+/(?:[^*/]+|\*)")


class PolicyFile(BaseModel, extra="forbid", strict=True):
    """The policy as it is written, in TOML."""

    identities: dict[str, list[str]]
    roles: dict[str, list[str]] = {}


class Policy:
    """The roles of identities; raises ValueError for a name that means nothing."""

    def __init__(self, file: PolicyFile) -> None:
        roles = {**ROLES, **{name: _own(name, rpcs) for name, rpcs in file.roles.items()}}
        self._entries = {name: _entry(name, of, roles) for name, of in file.identities.items()}

    @classmethod
    def read(cls, data: bytes) -> "Policy":
        """Return the policy in a file's content."""
        return cls(PolicyFile.model_validate(tomllib.loads(data.decode())))

    def caller(self, identity: str) -> Caller:
        """Return what an identity may do: by its own name, or by the longest that ends in `/*` and fits."""
        names = [identity]
        if identity.startswith("spiffe://"):
            ends = [at + 1 for at, letter in enumerate(identity) if letter == "/"]
            names += [identity[:end] + WILDCARD for end in reversed(ends)]
        entry = next((self._entries[name] for name in names if name in self._entries), NOBODY)
        return Caller(identity, entry.roles, entry.rpcs)


def _own(name: str, rpcs: list[str]) -> frozenset[str]:
    if name in ROLES:
        raise ValueError(f"the role {name} is built in, and can't be another")
    methods = frozenset(f"/{rpc}" for rpc in rpcs)
    if unknown := methods - RPCS:
        raise ValueError(f"the role {name} has no RPC: {', '.join(sorted(unknown))}")
    return methods


def _entry(name: str, roles: list[str], known: dict[str, frozenset[str]]) -> Caller:
    if not IDENTITY.fullmatch(name):
        raise ValueError(f"{name} is no identity; write jwt:SUBJECT, dns:name, spiffe://domain/path or …/*")
    if unknown := set(roles) - known.keys():
        raise ValueError(f"{name} has unknown roles: {', '.join(sorted(unknown))}")
    rpcs = frozenset().union(*(known[role] for role in roles))
    has = frozenset(known if "admin" in roles else roles)
    return Caller(name, has, rpcs | REFLECTION if roles else rpcs)
