"""Certificates for the tests, and their certificate authority."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from ipaddress import ip_address
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import (
    BasicConstraints,
    Certificate,
    CertificateBuilder,
    DNSName,
    GeneralName,
    IPAddress,
    Name,
    NameAttribute,
    RFC822Name,
    SubjectAlternativeName,
    UniformResourceIdentifier,
    random_serial_number,
)
from cryptography.x509.oid import NameOID

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key."""

    certificate: Certificate
    private: ec.EllipticCurvePrivateKey

    @cached_property
    def cert(self) -> bytes:
        """The certificate in PEM."""
        return self.certificate.public_bytes(Encoding.PEM)

    @cached_property
    def key(self) -> bytes:
        """The private key in PEM."""
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write both to files of a folder, and return these."""
        (folder / "cert.pem").write_bytes(self.cert)
        (folder / "key.pem").write_bytes(self.key)
        return folder / "cert.pem", folder / "key.pem"


class Authority:
    """A CA that signs certificates of servers and callers."""

    def __init__(self) -> None:
        self._pair = _pair("authority", [], None, DAY)
        self.cert = self._pair.cert

    def issue(self, *names: str, valid_for: timedelta = DAY) -> Pair:
        """Return a certificate for these names: URIs, e-mails, IP addresses, DNS names."""
        return _pair(names[0][:64], [_general(name) for name in names], self._pair, valid_for)

    def write(self, folder: Path) -> Path:
        """Write its own certificate to a file of a folder, and return that."""
        (folder / "ca.pem").write_bytes(self.cert)
        return folder / "ca.pem"


def _general(name: str) -> GeneralName:
    if "://" in name:
        return UniformResourceIdentifier(name)
    if "@" in name:
        return RFC822Name(name)
    return IPAddress(ip_address(name)) if name[-1].isdigit() else DNSName(name)


def _pair(name: str, names: list[GeneralName], issuer: Pair | None, valid_for: timedelta) -> Pair:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = Name([NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(private.public_key())
        .serial_number(random_serial_number())
        .not_valid_before(datetime.now(UTC) - 2 * DAY)
        .not_valid_after(datetime.now(UTC) + valid_for)
        .add_extension(BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(SubjectAlternativeName(names), critical=False)
    return Pair(builder.sign(issuer.private if issuer else private, SHA256()), private)
