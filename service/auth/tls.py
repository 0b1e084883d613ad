"""TLS: the server's certificate, and by whom its callers' certificates are signed."""

from datetime import datetime
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from service.auth.reloading import ReloadingFile
from service.settings import Settings


def server_credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """Return what the server listens with, None without TLS; raises OSError for files it can't use.

    Each new connection gets the certificate that is in the files then; others keep theirs. TLS is 1.2 or 1.3,
    which is gRPC's own minimum.
    """
    cert, key, client_ca = settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file
    if not (cert and key):
        return None
    watched = ReloadingFile(_configuration, cert, key, *filter(None, [client_ca]))
    return grpc.dynamic_ssl_server_credentials(
        watched.current(),
        watched.update,  # type: ignore[arg-type]  # None is for no change
        require_client_authentication=client_ca is not None,
    )


def expiry(cert: Path) -> datetime:
    """Return until when a server's certificate is good."""
    return load_pem_x509_certificates(cert.read_bytes())[0].not_valid_after_utc


def _configuration(
    cert: bytes, key: bytes, client_ca: bytes | None = None
) -> grpc.ServerCertificateConfiguration:
    """Return a pair as gRPC takes it, which would say nothing of a wrong one but fail each handshake."""
    if load_pem_x509_certificates(cert)[0].public_key() != load_pem_private_key(key, None).public_key():
        raise ValueError("the first certificate is not of this key")
    if client_ca is not None:
        load_pem_x509_certificates(client_ca)
    return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca)
