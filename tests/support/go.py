"""Builds programs in Go with the stubs of the contract."""

import shutil
import sys
from pathlib import Path

from tests.e2e.clients import CHECKOUT, installed
from tests.support.command import run
from tools.contract_image import write_image

MODULE = "example.org/hello"
FILES = [f"roster/v1/{name}.proto" for name in ("resources", "users", "posts", "bulk", "changes")]


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
    command += [f"--descriptor_set_in={write_image(folder / 'contract.binpb', for_stubs=True)}"]
    for kind in ("go", "go-grpc"):
        command += [f"--plugin={folder}/protoc-gen-{kind}", f"--{kind}_out={folder}"]
        command += [f"--{kind}_opt=module={MODULE}"]
        command += [f"--{kind}_opt=M{file}={MODULE}/roster/v1" for file in FILES]
    return [*command, *FILES]
