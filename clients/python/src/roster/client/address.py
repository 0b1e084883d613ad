"""Addresses of servers: gRPC's targets, with a sentence for what looks like one and is not."""

import re
from urllib.parse import urlsplit

DEFAULT_PORT = 50051
SECURE_PORT = 443  # of a URL
MAX_PORT = 65535
SECURE_SCHEMES = ("https", "grpcs")

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
# gRPC's own kinds of targets (https://github.com/grpc/grpc/blob/master/doc/naming.md).
SOCKET = re.compile(r"(unix|unix-abstract|vsock):.+")
NAMED = re.compile(r"(dns|ipv4|ipv6):(?://[^/]*/)?(.+)")
HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/@?#,\[\]]*):(\d{1,5})")


def check_address(address: str) -> str:
    """Return the address as a gRPC target; raises ValueError with the address that was probably meant.

    An address is `host:port`, `unix:/path`, or another target of gRPC, such as `dns:///name:port`. Without a
    host, it is this machine.
    """
    address = address.strip()
    if SOCKET.fullmatch(address):
        return address
    if named := NAMED.fullmatch(address):
        for endpoint in named[2].split(","):
            _check_endpoint(address, endpoint)
        return address
    if not address:
        raise ValueError(f"is empty; write host:port, such as 127.0.0.1:{DEFAULT_PORT}")
    if "@" in address:  # not repeated, because a password may precede it
        raise ValueError(f"has a user name, which gRPC does not use; write {_suggest(address)}")
    if scheme := SCHEME.fullmatch(address):
        is_secure = scheme[1].lower() in SECURE_SCHEMES
        tls = "; the CA of the server turns TLS on" if is_secure else ""
        port = SECURE_PORT if is_secure else DEFAULT_PORT
        raise ValueError(
            f"{address} has the scheme {scheme[1]}, which gRPC does not use; write "
            f"{_suggest(address, port)}{tls}"
        )
    _check_endpoint(address, address)
    return f"localhost{address}" if address.startswith(":") else address


def _check_endpoint(address: str, endpoint: str) -> None:
    """Raise ValueError unless an endpoint is a host and a port; `address` is the text to name."""
    found = HOST_AND_PORT.fullmatch(endpoint)
    if found and 0 < int(found[2]) <= MAX_PORT:
        return
    if found:
        raise ValueError(f"{address} has the port {found[2]}; a port is a number from 1 to {MAX_PORT}")
    if endpoint.startswith((".", "/", "~")):
        raise ValueError(f"{address} is a path; for a Unix socket, write unix:{endpoint}")
    if "," in endpoint:
        raise ValueError(f"{address} has several servers; give them one name in DNS, and write name:port")
    if endpoint.count(":") > 1 and "[" not in endpoint:
        raise ValueError(f"{address} is ambiguous; write IPv6 in brackets: [::1]:{DEFAULT_PORT}")
    problem = "is not a host and a port"
    if re.search(r"[/?#]", endpoint):
        problem = "has a path, which gRPC does not use"
    elif re.fullmatch(r"[^\s:@]+:?", endpoint):
        problem = "has no port"
    raise ValueError(f"{address} {problem}; write {_suggest(endpoint)}")


def _suggest(address: str, default_port: int = DEFAULT_PORT) -> str:
    """Return the host and port of a URL, with defaults for parts that are missing or wrong."""
    found = SCHEME.fullmatch(address)
    url = f"//{found[2] if found else address}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "127.0.0.1", parts.port or default_port
    except ValueError:
        return "host:port"
    if any(map(str.isspace, host)):
        return "host:port"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
