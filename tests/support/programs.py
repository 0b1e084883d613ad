"""Programs that the tests start: installed on this machine, or unpacked in `.tools` by `make tools`."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / ".tools"


@dataclass(frozen=True)
class Program:
    """A program, and the environment in which it finds its libraries."""

    path: Path
    environment: dict[str, str]


def program(name: str, target: str = "tools") -> Program:
    """Return a program; skips the test if it is missing, and names the target of make that brings it."""
    unpacked = [*TOOLS.glob("*/usr/sbin"), *TOOLS.glob("*/usr/bin")]
    found = shutil.which(name, path=os.pathsep.join([*os.get_exec_path(), "/usr/sbin", *map(str, unpacked)]))
    if not found:
        pytest.skip(f"{name} is missing: run `make {target}`, and heed its warnings")
    path = Path(found)
    environment = {"PATH": os.defpath}
    if path.is_relative_to(TOOLS):
        libraries = (path.parents[1] / "lib").glob("*-linux-*")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, libraries))
    return Program(path, environment)
