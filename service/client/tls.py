"""What a channel takes for TLS, and how it tells the server who calls."""

from collections.abc import Callable
from typing import Any

import grpc


def tls_credentials(
    ca: bytes | None = None,
    key: bytes | None = None,
    certificate: bytes | None = None,
    *,
    token: Callable[[], str] | None = None,
) -> grpc.ChannelCredentials:
    """Return what `channel` takes for TLS: the CA of the server, PEM, and what tells the server who calls.

    That is a key with its certificate, or what returns a bearer token. It is asked for each call, in a thread
    of gRPC's, so that it can hand out a new one before the old one expires.
    """
    tls = grpc.ssl_channel_credentials(ca, key, certificate)
    if token is None:
        return tls

    def bearer(_: grpc.AuthMetadataContext, tell: grpc.AuthMetadataPluginCallback) -> None:
        tell((("authorization", f"Bearer {token()}"),), None)

    plugin: Any = bearer
    return grpc.composite_channel_credentials(tls, grpc.metadata_call_credentials(plugin))
