"""Credentials for a channel: TLS, bearer tokens, and tokens in plain text on this machine."""

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
    """Return credentials for `channel`; raises ValueError if a certificate or the key is not in PEM.

    `ca` is the CA of the server, in PEM. The client authenticates with a key and its certificate, also in
    PEM, or with a bearer token. `token` is called for each RPC, in a thread of gRPC's, so it can return a
    new token before the old one expires.
    """
    for name, text in (("ca", ca), ("key", key), ("certificate", certificate)):
        if text is not None and b"-----BEGIN " not in text:  # gRPC would try to connect all the same
            raise ValueError(f"{name} is not in PEM")
    tls = grpc.ssl_channel_credentials(ca, key, certificate)
    return _with_token(tls, token) if token else tls


def local_credentials(address: str, token: Callable[[], str]) -> grpc.ChannelCredentials:
    """Return credentials that send a bearer token in plain text, but only to this machine.

    They are for a sidecar or a tunnel that adds TLS. gRPC closes a connection that is not to a loopback
    address or a Unix socket, before it sends anything. `token` is called as in `tls_credentials`.
    """
    kinds = grpc.LocalConnectionType
    kind = kinds.UDS if address.startswith("unix") else kinds.LOCAL_TCP
    return _with_token(grpc.local_channel_credentials(kind), token)


def _with_token(credentials: grpc.ChannelCredentials, token: Callable[[], str]) -> grpc.ChannelCredentials:
    def add_token(_: grpc.AuthMetadataContext, callback: grpc.AuthMetadataPluginCallback) -> None:
        callback((("authorization", f"Bearer {token()}"),), None)

    plugin: Any = add_token
    return grpc.composite_channel_credentials(credentials, grpc.metadata_call_credentials(plugin))
