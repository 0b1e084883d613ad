"""The caller of the current call, and its permissions."""

from collections.abc import Callable, Set as AbstractSet
from contextvars import ContextVar
from dataclasses import dataclass

from roster.errors import PermissionDenied


@dataclass(frozen=True, slots=True)
class Caller:
    """An identity with its roles; `rpcs` are the paths of the RPCs that the roles allow."""

    identity: str
    roles: AbstractSet[str] = frozenset()
    rpcs: AbstractSet[str] = frozenset()

    def has(self, role: str) -> bool:
        return role in self.roles

    def require(self, role: str, part: str) -> None:
        """Raise PermissionDenied unless the caller has the role that this part of its request needs."""
        if role not in self.roles:
            raise PermissionDenied.because(
                f"{self.identity} does not have the role {role}, which {part} needs"
            )

    def require_rpc(self, rpc: str, part: str) -> None:
        """Raise PermissionDenied unless the caller may call the RPC that this part of its request needs."""
        if rpc not in self.rpcs:
            raise PermissionDenied.because(f"{self.identity} may not call {rpc}, which {part} needs")

    @property
    def owner(self) -> str | None:
        """The identity whose loads the caller may see; None, for an admin, means everyone's."""
        return None if self.has("admin") else self.identity


ANONYMOUS_IDENTITY = "anonymous"
NOBODY = Caller(ANONYMOUS_IDENTITY)  # no roles
# The share of work for no caller or for several. No identity has this name: theirs have prefixes.
SYSTEM = "system"
# Set by `interceptors/auth.py`. Each call has its own task, and so its own context.
_current: ContextVar[Caller] = ContextVar("caller", default=NOBODY)
# Authorises the current call again; only watches have it.
_authorise: ContextVar[Callable[[], None]] = ContextVar("authorise")


def set_caller(caller: Caller) -> None:
    """Set the caller for the rest of the current call."""
    _current.set(caller)


def set_authorisation(authorise: Callable[[], None]) -> None:
    """Set the function that authorises the current call again, and sets its caller."""
    _authorise.set(authorise)


def authorise_again() -> None:
    """Identify the caller of a watch again, and check its right to the RPC; raises Refused.

    A token can expire while a watch lasts, and a policy can change.
    """
    _authorise.get()()


def current_caller() -> Caller:
    """Return the caller of the current call; NOBODY before authentication, and outside of calls."""
    return _current.get()


def current_share() -> str:
    """Return the name under which the current task gets its share of a resource."""
    caller = _current.get()
    return SYSTEM if caller is NOBODY else caller.identity
