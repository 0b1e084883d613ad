"""Load from the generator in Go: calls with requests from a file, and what they took."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measure import Clock, Run
from bench.peers.build import LOAD

CONNECTIONS = 4  # fewer if fewer calls are in flight


@dataclass(frozen=True)
class Load:
    """Calls of a method, `in_flight` at a time, for some seconds or until there were `calls` of them.

    Each call counts as `rows`.
    """

    method: str
    requests: Path
    in_flight: int = 1
    seconds: float = 0
    calls: int = 0
    rows: int = 1
    connections: int = CONNECTIONS

    def run(self, address: str, server: int, postmaster: int, cores: str = "") -> Run:
        """Run the load; raises CalledProcessError if a call fails. `cores` are those of the generator."""
        connections = min(self.in_flight, self.connections)
        command = ["taskset", "--cpu-list", cores] if cores else []
        command += [str(LOAD), address, f"/roster.v1.{self.method}", str(self.requests)]
        command += map(str, (connections, self.in_flight, self.seconds, self.calls))
        clock = Clock(server=server, postgresql=postmaster)
        done = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
        return clock.stop(done["calls"] * self.rows, done["seconds"], p50=done["p50"], p99=done["p99"])


def write_requests(path: Path, requests: Sequence[Any]) -> Path:
    """Write messages with gRPC's prefix: not compressed, and the length."""
    messages = [request.SerializeToString() for request in requests]
    path.write_bytes(b"".join(b"\0" + len(message).to_bytes(4) + message for message in messages))
    return path
