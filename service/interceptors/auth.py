"""Who calls, and whether they may: before anything of the call is read."""

import logging
from typing import Any

from service.auth.caller import NOBODY, Caller, set_caller
from service.auth.policy import ANONYMOUS, HEALTH, Policy
from service.auth.reloading import ReloadingFile
from service.auth.tokens import Tokens
from service.errors import PermissionDenied, Refused, Unauthenticated
from service.interceptors.chain import Around, Context, Proceed

log = logging.getLogger(__name__)

MAX_IDENTITY = 255  # as its column


class Auth(Around):
    """Knows each call by its token, or else by its client certificate; health checks need neither.

    Without a policy everybody is anonymous and may do everything. Why a call was refused is in the log; its
    caller gets the same sentence for every cause.
    """

    def __init__(self, policy: ReloadingFile[Policy] | None, tokens: Tokens | None) -> None:
        super().__init__()
        self._policy = policy
        self._tokens = tokens

    async def around(self, method: str, proceed: Proceed, request: Any, context: Context) -> Any:
        try:
            self._admit(method, context)
            return await proceed(request, context)
        except Refused as refused:
            log.warning("%s was refused for %s: %s", method, context.peer(), refused.cause)
            raise

    def _admit(self, method: str, context: Context) -> None:
        caller = self._caller(method, context)
        set_caller(caller)
        if self._policy and method not in caller.rpcs and method not in HEALTH:
            raise PermissionDenied.because(f"{caller.identity} has no role for it")

    def _caller(self, method: str, context: Context) -> Caller:
        if self._policy is None:
            return ANONYMOUS
        if method in HEALTH:
            return NOBODY
        return self._policy.current().caller(self._identity(context))

    def _identity(self, context: Context) -> str:
        token = _bearer(context) if self._tokens else None
        if token is not None and self._tokens:
            identity = f"jwt:{self._tokens.subject(token)}"
        else:
            identity = _certified(context)
        if len(identity) > MAX_IDENTITY or not identity.isprintable():
            raise Unauthenticated.because(
                f"the identity has over {MAX_IDENTITY} characters, or some not printable"
            )
        return identity


def _bearer(context: Context) -> str | None:
    values = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not values:
        return None
    scheme, _, token = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer":
        raise Unauthenticated.because("authorization must come once, as Bearer and a token")
    return token


def _certified(context: Context) -> str:
    """Return the name in the client's certificate: its SPIFFE ID, or else its first DNS name."""
    names = {name: [*values] for name, values in context.auth_context().items()}
    if "peer_spiffe_id" in names:
        return names["peer_spiffe_id"][0].decode()
    # With another URI beside it a SPIFFE ID is none, by its standard (X509-SVID).
    if "peer_dns" in names and "peer_uri" not in names:
        return f"dns:{names['peer_dns'][0].decode().lower()}"
    raise Unauthenticated.because(
        "there is no token, and no client certificate with a SPIFFE ID or a DNS name"
    )
