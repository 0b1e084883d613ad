"""Builds programs in Go with the stubs of the contract."""

import shutil
import sys
from pathlib import Path

import grpc_tools
from google.rpc import error_details_pb2

from tests.e2e.clients import CHECKOUT, installed
from tests.support.command import run

MODULE = "example.org/hello"
FILES = [f"roster/v1/{name}.proto" for name in ("resources", "users", "posts", "bulk", "changes")]
INCLUDES = [
    CHECKOUT / "protos",
    Path(error_details_pb2.__file__).parents[2],
    Path(grpc_tools.__file__).parent / "_proto",
]


async def build(program: str, folder: Path) -> Path:
    """Build a program in an empty folder, and return its path; skips the test if Go is missing."""
    for name in ("go.mod", "go.sum"):
        shutil.copy(CHECKOUT / "tests/e2e/go" / name, folder)
    (folder / "main.go").write_text(program)
    go = installed("go")
    for command in (
        (go, "build", "-o", f"{folder}/", "tool"),
        protoc(folder),
        (go, "build", "-o", "program", "."),
    ):
        done = await run(*command, folder=folder)
        assert done.status == 0, done.err
    return folder / "program"


def protoc(folder: Path) -> list[str | Path]:
    """Return the command that generates the stubs."""
    command: list[str | Path] = [sys.executable, "-m", "grpc_tools.protoc"]
    command += [f"-I{path}" for path in INCLUDES]
    for kind in ("go", "go-grpc"):
        command += [f"--plugin={folder}/protoc-gen-{kind}", f"--{kind}_out={folder}"]
        command += [f"--{kind}_opt=module={MODULE}"]
        command += [f"--{kind}_opt=M{file}={MODULE}/roster/v1" for file in FILES]
    return [*command, *FILES]
