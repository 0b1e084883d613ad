"""TLS and bearer-token credentials for a channel."""

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
    """Return credentials for `channel`.

    `ca` is the CA of the server, in PEM. The client authenticates with a key and its certificate, also in
    PEM, or with a bearer token. `token` is called for each RPC, in a thread of gRPC's, so it can return a
    new token before the old one expires.
    """
    tls = grpc.ssl_channel_credentials(ca, key, certificate)
    if token is None:
        return tls

    def add_token(_: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((("authorization", f"Bearer {token()}"),), None)

    plugin: Any = add_token
    return grpc.composite_channel_credentials(tls, grpc.metadata_call_credentials(plugin))
