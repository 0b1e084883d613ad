"""Addresses of servers, as people write them."""

import pytest

from roster.client import channel
from roster.client.address import check_address


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "roster.example.org:443",
        "[::1]:50051",
        "[fe80::1%eth0]:50051",
        "dns:roster:50051",
        "dns:///roster.default.svc.cluster.local:50051",
        "dns://8.8.8.8/roster.example.org:50051",
        "ipv4:127.0.0.1:50051,127.0.0.2:50051",
        "ipv6:[::1]:50051",
        "unix:/run/roster.sock",
        "unix:///run/roster.sock",
        "unix:roster.sock",
        "unix-abstract:roster",
    ],
)
def test_accepts_targets_of_grpc(address: str) -> None:
    """These are the examples of gRPC's document on names, with a port."""
    assert check_address(address) == address


@pytest.mark.parametrize(
    ("address", "target"),
    [
        (" 127.0.0.1:50051\n", "127.0.0.1:50051"),
        (":50051", "localhost:50051"),
    ],
)
def test_completes_addresses_with_one_meaning(address: str, target: str) -> None:
    """Files end in a newline; no host means this machine, as in Go."""
    assert check_address(address) == target


@pytest.mark.parametrize(
    ("address", "advice"),
    [
        ("http://127.0.0.1:50051", "has the scheme http, which gRPC does not use; write 127.0.0.1:50051$"),
        ("HTTP://roster/", "has the scheme HTTP, .* write roster:50051$"),
        ("https://roster.example.org", "write roster.example.org:443; the CA of the server turns TLS on$"),
        ("https://[::1]:8443/x?y#z", r"write \[::1\]:8443; the CA"),
        ("grpc://roster:50051", "write roster:50051$"),
        ("grpcs://roster:50051", "write roster:50051; the CA of the server turns TLS on$"),
        ("tcp://10.0.0.7:50051", "write 10.0.0.7:50051$"),
        ("127.0.0.1:50051/", "has a path, which gRPC does not use; write 127.0.0.1:50051$"),
        ("roster:50051/roster.v1.UserService", "write roster:50051$"),
        ("dns:///roster", "has no port; write roster:50051$"),
        ("localhost", "has no port; write localhost:50051$"),
        ("localhost:", "has no port; write localhost:50051$"),
        ("[::1]", r"write \[::1\]:50051$"),
        ("::1:50051", r"is ambiguous; write IPv6 in brackets: \[::1\]:50051$"),
        ("roster:0", "has the port 0; a port is a number from 1 to 65535$"),
        ("roster:65536", "has the port 65536; "),
        ("roster:grpc", "is not a host and a port; write host:port$"),
        ("/run/roster.sock", "is a path; for a Unix socket, write unix:/run/roster.sock$"),
        ("./roster.sock", "write unix:./roster.sock$"),
        ("a:50051,b:50051", "has several servers; give them one name in DNS, and write name:port$"),
        ("ipv4:10.0.0.1:50051,10.0.0.2", "has no port"),
        ("my server:50051", "is not a host and a port; write host:port$"),
        ("", "is empty; write host:port, such as 127.0.0.1:50051$"),
    ],
)
def test_refuses_other_addresses_with_the_right_one(address: str, advice: str) -> None:
    """The sentence begins with the address."""
    with pytest.raises(ValueError, match=advice) as refused:
        check_address(address)
    assert str(refused.value).startswith(address)


def test_does_not_repeat_a_password() -> None:
    """A URL of a database may be pasted by mistake."""
    with pytest.raises(ValueError, match=r"write db:5432$") as refused:
        check_address("postgresql://roster:secret@db:5432/roster")
    assert "secret" not in str(refused.value)


async def test_channel_refuses_an_address_at_once() -> None:
    """Without this, the first call would fail after its deadline."""
    with pytest.raises(ValueError, match="has the scheme http"):
        channel("http://127.0.0.1:50051")
    with pytest.raises(ValueError, match=r"server_name .* needs TLS credentials"):
        channel("127.0.0.1:50051", server_name="roster")
