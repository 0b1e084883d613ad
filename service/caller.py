"""Who makes the call, and what they may do."""

from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from dataclasses import dataclass

from service.errors import PermissionDenied


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody with roles; `rpcs` are the methods, named as on the wire, that these allow together."""

    identity: str
    roles: AbstractSet[str] = frozenset()
    rpcs: AbstractSet[str] = frozenset()

    def has(self, role: str) -> bool:
        return role in self.roles

    def require(self, role: str, what: str) -> None:
        """Raise PermissionDenied where something in a request, beside the RPC itself, needs a role."""
        if role not in self.roles:
            raise PermissionDenied.because(f"{self.identity} is no {role}, which {what} needs")

    def require_rpc(self, rpc: str, what: str) -> None:
        """Raise PermissionDenied unless the caller may also call the RPC that part of a request needs."""
        if rpc not in self.rpcs:
            raise PermissionDenied.because(f"{self.identity} may not call {rpc}, which {what} needs")

    @property
    def owner(self) -> str | None:
        """Whose loads they see: their own, and an admin those of all, which is None."""
        return None if self.has("admin") else self.identity


ANONYMOUS_IDENTITY = "anonymous"
NOBODY = Caller(ANONYMOUS_IDENTITY)  # no roles
# Whose share pays for what no caller asked for, or many did. No identity is named so: theirs have prefixes.
SYSTEM = "system"
# Set for each call by `interceptors/auth.py`. A call has a task of its own, and so a context.
_current: ContextVar[Caller] = ContextVar("caller", default=NOBODY)


def set_caller(caller: Caller) -> None:
    """Tell for the rest of this call who makes it."""
    _current.set(caller)


def current_caller() -> Caller:
    """Return who makes this call; before that is known, and outside of one, it is nobody."""
    return _current.get()


def current_share() -> str:
    """Return the name under which work of this task gets its share of a resource."""
    caller = _current.get()
    return SYSTEM if caller is NOBODY else caller.identity
