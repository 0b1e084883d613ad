"""TLS: the server's certificate, and the CA of client certificates.

The package cryptography, which parses certificates, takes 8 MiB: a server without TLS does not import it.
"""

from datetime import datetime
from pathlib import Path

import grpc

from service.auth.reloading import ReloadingFile
from service.settings import Settings
from service.variables import is_local


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return the server's credentials, None without TLS; raises OSError for files that can't be used.

    New connections use the current certificate, existing ones keep theirs. gRPC allows TLS 1.2 and 1.3.
    """
    cert, key, client_ca = settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
    if not (cert and key):
        return None
    watched = ReloadingFile(_configuration, cert, key, *filter(None, [client_ca]))
    return grpc.dynamic_ssl_server_credentials(
        watched.current(),
        watched.update,  # type: ignore[arg-type]  # None means no change
        require_client_authentication=client_ca is not None,
    )


def expiry(cert: Path) -> datetime:
    """Return the time at which a server certificate expires."""
    from cryptography.x509 import load_pem_x509_certificates  # noqa: PLC0415

    return load_pem_x509_certificates(cert.read_bytes())[0].not_valid_after_utc


def exposure(settings: Settings) -> str | None:
    """Return what the network must keep strangers from, with ROSTER_INSECURE; None if it need not."""
    if not settings.insecure or is_local(settings.listen):
        return None
    has_tls, authenticates = bool(settings.tls_cert_file), bool(settings.policy_file)
    if not authenticates:
        return "without authentication, anyone who can reach {} can read, change and delete everything"
    if not has_tls:
        return (
            "without TLS, tokens and rows can be read on the way to {}; callers still need a token and a "
            "role, but let only the proxy that ends TLS reach it"
        )
    return None


def _configuration(
    cert: bytes, key: bytes, client_ca: bytes | None = None
) -> grpc.ServerCertificateConfiguration:
    """Return a certificate configuration; raises ValueError for one with which every handshake would fail."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415
    from cryptography.x509 import load_pem_x509_certificates  # noqa: PLC0415

    if load_pem_x509_certificates(cert)[0].public_key() != load_pem_private_key(key, None).public_key():
        raise ValueError("the first certificate does not match the key")
    if client_ca is not None:
        load_pem_x509_certificates(client_ca)
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)
