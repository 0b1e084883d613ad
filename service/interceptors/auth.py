"""Authenticates and authorises each call before any of its messages is read."""

import logging
from functools import partial
from typing import TYPE_CHECKING

from roster.errors import PermissionDenied, Refused, Unauthenticated
from service.auth.caller import NOBODY, Caller, set_authorisation, set_caller
from service.auth.policy import ANONYMOUS, HEALTH, Policy
from service.auth.reloading import ReloadingFile
from service.interceptors.chain import Context, Proceed, Request, Response, Rpc

if TYPE_CHECKING:
    from service.auth.tokens import Tokens

log = logging.getLogger(__name__)

MAX_IDENTITY = 255  # characters; the length of the columns that store it


class Auth:
    """Identifies callers by bearer token, or else by client certificate; health checks need neither.

    Without a policy every caller is anonymous and may call everything. The log says why a call was refused;
    the caller gets the same message for every cause.
    """

    def __init__(self, policy: ReloadingFile[Policy] | None, tokens: "Tokens | None") -> None:
        self._policy = policy
        self._tokens = tokens

    def intercept(self, rpc: Rpc, proceed: Proceed) -> Proceed:
        """Refuse calls of an RPC by callers who may not call it; set the caller of the others."""

        async def authorise(request: Request, context: Context) -> Response:
            try:
                self._authorise(rpc.path, context)
                if rpc.is_watch:
                    set_authorisation(partial(self._authorise, rpc.path, context))
                return await proceed(request, context)
            except Refused as refused:
                log.warning("%s was refused for %s: %s", rpc.path, context.peer(), refused.cause)
                raise

        return authorise

    def _authorise(self, path: str, context: Context) -> None:
        caller = self._caller(path, context)
        set_caller(caller)
        if self._policy and path not in caller.rpcs and path not in HEALTH:
            raise PermissionDenied.because(f"no role of {caller.identity} allows it")

    def _caller(self, path: str, context: Context) -> Caller:
        if self._policy is None:
            return ANONYMOUS
        if path in HEALTH:
            return NOBODY
        return self._policy.current().caller(self._identity(context))

    def _identity(self, context: Context) -> str:
        token = _bearer_token(context) if self._tokens else None
        if token is not None and self._tokens:
            identity = f"jwt:{self._tokens.subject(token)}"
        else:
            identity = _certificate_identity(context)
        if len(identity) > MAX_IDENTITY or not identity.isprintable():
            raise Unauthenticated.because(
                f"the identity has more than {MAX_IDENTITY} characters, or unprintable ones"
            )
        return identity


def _bearer_token(context: Context) -> str | None:
    values = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not values:
        return None
    scheme, _, token = values[0].partition(" ")
    if len(values) > 1 or scheme.lower() != "bearer":
        raise Unauthenticated.because("authorization must be sent once, as `Bearer TOKEN`")
    return token


def _certificate_identity(context: Context) -> str:
    """Return the name in the client's certificate: its SPIFFE ID, or else its first DNS name."""
    names = {name: [*values] for name, values in context.auth_context().items()}
    if "peer_spiffe_id" in names:
        return names["peer_spiffe_id"][0].decode()
    # A certificate with several URIs has no valid SPIFFE ID (X509-SVID, section 2). Its DNS name is not used
    # instead.
    if "peer_dns" in names and "peer_uri" not in names:
        return f"dns:{names['peer_dns'][0].decode().lower()}"
    raise Unauthenticated.because(
        "the call has neither a token nor a client certificate with a SPIFFE ID or a DNS name"
    )
