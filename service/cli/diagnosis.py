"""Diagnose a failed connection by opening another; gRPC reports little."""

import socket
import ssl
from contextlib import closing, suppress
from dataclasses import dataclass

SECONDS = 3.0
MAX_NAMES = 5
ALPN = ["h2"]
# What getaddrinfo says of a name that does not exist, or that has no address.
UNKNOWN = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}


@dataclass(frozen=True)
class Tls:
    """The client's side of TLS: its context, the name it expects, and whether it has a certificate."""

    context: ssl.SSLContext
    server_name: str | None
    has_certificate: bool


def diagnose(address: str, tls: Tls | None) -> str | None:
    """Return why client and server don't match, in a sentence; None if nothing was found.

    Without `tls` the client uses plain text. Nothing is sent over the connection but a handshake.
    """
    try:
        if tls:
            return _diagnose_tls(address, tls)
        _certificate(address)
    except (socket.gaierror, UnicodeError) as error:
        return _unknown_host(address, error)
    except (OSError, ValueError):  # no TLS there, no server, or not an address with a host
        return None
    return f"the server at {address} uses TLS; pass its CA with --tls-ca"


def _unknown_host(address: str, error: socket.gaierror | UnicodeError) -> str:
    host = _host(address)
    if isinstance(error, UnicodeError) or error.errno in UNKNOWN:
        return f"the name {host} is not known; check --address"
    return f"the name {host} can't be looked up: {error.strerror}; check --address and the DNS"


def _diagnose_tls(address: str, tls: Tls) -> str | None:
    tls.context.set_alpn_protocols(ALPN)
    tls.context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as in gRPC; Python 3.13 is stricter
    name = tls.server_name or _host(address)
    with closing(_connect(address)) as plain:
        try:
            connection = tls.context.wrap_socket(plain, server_hostname=name)
        except ssl.SSLCertVerificationError as error:
            if "mismatch" in error.verify_message:
                return _mismatch(address, name)
            return (
                f"the certificate of {address} is not trusted: {error.verify_message}; --tls-ca must be the "
                "CA that has signed it"
            )
        except ssl.SSLError as error:
            if "ALERT" in (error.reason or ""):  # TLS 1.2 refuses a certificate within the handshake
                return _not_accepted(address, tls)
            return f"the server at {address} does not use TLS; leave out --tls-ca"
        # TLS 1.3 refuses a client's certificate after the handshake; gRPC closes the connection.
        with closing(connection):
            try:
                is_accepted = connection.recv(1) != b""
            except TimeoutError:
                return None
            except OSError:
                is_accepted = False
    return None if is_accepted else _not_accepted(address, tls)


def _not_accepted(address: str, tls: Tls) -> str:
    if tls.has_certificate:
        return f"the server at {address} does not accept the client certificate; check --tls-cert"
    return f"the server at {address} requires a client certificate; pass --tls-cert and --tls-key"


def _mismatch(address: str, name: str) -> str:
    from cryptography import x509  # noqa: PLC0415  (slow to import, and needed for this error only)

    names: list[str] = []
    with suppress(OSError, ValueError, x509.ExtensionNotFound):
        extensions = x509.load_der_x509_certificate(_certificate(address)).extensions
        found = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [*found.get_values_for_type(x509.DNSName)]
    known = f", but for {', '.join(names[:MAX_NAMES])}" if names else ""
    return f"the certificate of {address} is not for {name}{known}; pass a name in it with --tls-server-name"


def _certificate(address: str) -> bytes:
    """Return the certificate of a server in DER, unverified; raises OSError if it does not use TLS."""
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    unverified.set_alpn_protocols(ALPN)
    with closing(_connect(address)) as plain, unverified.wrap_socket(plain) as connection:
        return connection.getpeercert(binary_form=True) or b""


def _connect(address: str) -> socket.socket:
    """Return a connection to the first server of a gRPC target; raises OSError, ValueError."""
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(SECONDS)
        connection.connect(address.removeprefix("unix:").removeprefix("//"))
        return connection
    port = int(_endpoint(address).rpartition(":")[2])
    return socket.create_connection((_host(address), port), timeout=SECONDS)


def _host(address: str) -> str:
    """Return the host that gRPC expects in the certificate of a target."""
    if address.startswith("unix"):
        return "localhost"
    return _endpoint(address).rpartition(":")[0].strip("[]")


def _endpoint(address: str) -> str:
    """Return `host:port` of a target such as `dns:///host:port`."""
    return address.rpartition("/")[2].removeprefix("dns:").removeprefix("ipv4:").partition(",")[0]
