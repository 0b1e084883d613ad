"""Why no server was reached, in a sentence: gRPC's own texts name the step of its code that failed."""

import re

UNTRUSTED = "its certificate is from a CA that these credentials don't trust"
CLOSED = "it closed the connection; it may expect TLS, or a client certificate"

# A part of gRPC's text -> the cause. The first that is found wins.
CAUSES = {
    "CERTIFICATE_VERIFY_FAILED: certificate has expired": "its certificate has expired",
    "CERTIFICATE_VERIFY_FAILED": UNTRUSTED,
    "certificate signature failure": UNTRUSTED,  # the trusted CA has the same name, but another key
    "Hostname Verification Check failed": (
        "its certificate is for another name; if that is right, pass it as server_name"
    ),
    "CERTIFICATE_REQUIRED": "it requires a client certificate",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "missing selected ALPN property": "it speaks TLS, but not HTTP/2, so it is not a gRPC server",
    "Tls handshake failed": "the TLS handshake failed",
    "http1": "it answers in HTTP/1.1, so it is not a gRPC server",
    "Expected SETTINGS frame": "it does not answer in HTTP/2: it is not a gRPC server, or it expects TLS",
    "Connection refused": "nothing listens there (connection refused)",
    "No such file or directory": "there is no such socket",
    "Domain name not found": "the name is not known",
    "address lookup failed": "the name can't be looked up",
    "errors resolving": "the name can't be looked up",
    "Socket closed": CLOSED,
    "Connection reset": CLOSED,
    "Broken pipe": CLOSED,
    "No route to host": "there is no route to it",
    "Network is unreachable": "the network is unreachable",
    "Timeout occurred": "it does not answer",
    "timed out": "it does not answer",
}
# How gRPC's messages begin if no connection could be made. Others mean that one was lost.
NOT_CONNECTED = re.compile(
    r"failed to connect|connections to all backends failing|errors resolving", re.IGNORECASE
)


def no_server(address: str) -> str:
    """Return how a message begins that reports that no server was reached; address "" is not known."""
    return f"no server answers at {address}" if address else "no server answers"


def explain(message: str, address: str) -> str:
    """Return the sentence for gRPC's message about a call without a connection, "" for another message."""
    if not NOT_CONNECTED.match(message):
        return ""
    cause = next((cause for text, cause in CAUSES.items() if text in message), message)
    return f"{no_server(address)}: {cause}"
