"""Explain why a server may have refused a caller. The server itself reports no cause to strangers."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

LOG = "the server's log has the cause"


def explain_refusal(token: str | None, source: str, option: str, *, has_certificate: bool) -> str:
    """Return what is wrong with the credentials of a client, as far as the client can see it.

    `source` is where the token comes from, and `option` names a file with one. The claims are read without a
    check of the signature.
    """
    if token is None:
        return LOG if has_certificate else f"pass {option}, or --tls-cert and --tls-key"
    if not token:
        return f"{source} is empty"
    if token[:7].lower() == "bearer ":
        return f"{source} begins with Bearer; leave out that word"
    claims = _claims(token)
    if claims is None:
        return f"{source} contains no JWT"
    return _time_problem(claims, f"the token in {source}", datetime.now(UTC)) or LOG


def _claims(token: str) -> Mapping[str, Any] | None:
    import jwt  # noqa: PLC0415  (slow to import, and needed for this error only)

    try:
        claims: Mapping[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        return None
    return claims


def _time_problem(claims: Mapping[str, Any], subject: str, now: datetime) -> str:
    end, start = _time(claims.get("exp")), _time(claims.get("nbf"))
    if end and end <= now:
        return f"{subject} expired at {_format(end, now)}"
    if start and start > now:
        return f"{subject} is not valid before {_format(start, now)}"
    return ""


def _time(claim: object) -> datetime | None:
    try:
        return datetime.fromtimestamp(float(claim), UTC)  # type: ignore[arg-type]  # a claim is any JSON
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _format(time: datetime, now: datetime) -> str:
    """Return a time, with its date unless that is today."""
    return f"{time:%H:%M} UTC" if time.date() == now.date() else f"{time:%Y-%m-%d %H:%M} UTC"
