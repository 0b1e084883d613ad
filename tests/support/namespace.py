"""A PostgreSQL in a network namespace of its own, whose network can be cut: packets are dropped."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tests.support.postgres import owner
from tests.support.replication import Node


@dataclass(frozen=True)
class Namespace:
    """A network namespace, connected with this machine's by one link."""

    name: str
    address: str

    def cut(self) -> None:
        """Set the link down, on the far side: this side notices nothing."""
        _ip("-n", self.name, "link", "set", "inside", "down")


@contextmanager
def namespace() -> Iterator[Namespace]:
    """Make a namespace; skips the test, loudly, where that is not permitted."""
    name = f"roster{os.getpid()}"
    # Two of the addresses for benchmarks (RFC 2544), which no network uses.
    network = f"198.18.{os.getpid() % 256}"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: a dropped network. No network namespace can be made: {error}")
    try:
        _ip("link", "add", name, "type", "veth", "peer", "name", "inside", "netns", name)
        _ip("address", "add", f"{network}.1/30", "dev", name)
        _ip("link", "set", name, "up")
        _ip("-n", name, "address", "add", f"{network}.2/30", "dev", "inside")
        _ip("-n", name, "link", "set", "inside", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield Namespace(name, f"{network}.2")
    finally:
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)
        _ip("netns", "delete", name)


class IsolatedNode(Node):
    """A server in a network namespace."""

    def __init__(self, name: str, space: Namespace) -> None:
        self._space = space
        super().__init__(name)
        self.url = self.url.set(host=space.address)
        self.configure(listen_addresses="'*'")
        with (self.data / "pg_hba.conf").open("a") as rules:
            rules.write("host all,replication all samenet trust\n")

    def _run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        if program != "pg_ctl":
            return super()._run(program, *arguments)
        user = owner()
        enter = ["nsenter", f"--net=/run/netns/{self._space.name}"]
        become = ["setpriv", f"--reuid={user['user']}", f"--regid={user['group']}", "--clear-groups"]
        return subprocess.run(
            [*enter, *become, self._programs / program, *arguments],
            env={"PATH": os.defpath},
            cwd="/",
            check=False,
            capture_output=True,
            text=True,
        )


def _ip(*arguments: str) -> None:
    if os.geteuid() != 0 or not shutil.which("ip"):
        raise OSError("this needs root, and the program ip")
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
