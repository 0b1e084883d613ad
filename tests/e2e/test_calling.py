"""The examples in other languages on docs/calling.md."""

import os
import re
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc_tools
import pytest
from google.rpc import error_details_pb2

from tests.e2e.clients import CHECKOUT, NODE, installed
from tests.support.command import Ended, run, serving

PAGE = (CHECKOUT / "docs/calling.md").read_text()
GO = Path(__file__).with_name("go")
MODULE = "example.org/hello"
FILES = [f"roster/v1/{name}.proto" for name in ("resources", "users", "posts", "bulk")]
INCLUDES = [
    CHECKOUT / "protos",
    Path(error_details_pb2.__file__).parents[2],
    Path(grpc_tools.__file__).parent / "_proto",
]


def example(language: str) -> tuple[str, str]:
    """Return a program of the page, and its expected output."""
    (program, printed), *_ = re.findall(rf"```{language}\n(.*?)```\n```text\n(.*?)```", PAGE, re.DOTALL)
    return program, printed


@pytest.fixture
async def address(tmp_path: Path) -> AsyncIterator[str]:
    """The address of a server."""
    async with serving(tmp_path) as server:
        yield server.address


async def run_program(*command: str | Path, folder: Path) -> Ended:
    """Run a program, which must succeed."""
    ended = await run(*command, folder=folder)
    assert ended.status == 0, ended.err
    return ended


async def test_node_example(address: str, tmp_path: Path) -> None:
    """It creates a user once, repeats the request, and prints the reason of an error; each time it runs."""
    if not (NODE / "node_modules").is_dir():
        pytest.skip(f"{NODE}/node_modules is missing: run `make tools`, and heed its warnings")
    program, printed = example("js")
    (tmp_path / "node_modules").symlink_to(NODE / "node_modules")
    (tmp_path / "hello.mjs").write_text(program)

    for _ in range(2):
        ended = await run_program(installed("node"), "hello.mjs", address, *INCLUDES[:2], folder=tmp_path)
        assert ended.out == printed


@pytest.mark.skipif("ROSTER_TEST_GO" not in os.environ, reason="compiles for a minute: run `make test-go`")
async def test_go_example(address: str, tmp_path: Path) -> None:
    """It does the same with generated stubs."""
    program, printed = example("go")
    shutil.copy(GO / "go.mod", tmp_path)
    shutil.copy(GO / "go.sum", tmp_path)
    (tmp_path / "hello.go").write_text(program)
    go = installed("go")
    await run_program(go, "build", "-o", f"{tmp_path}/", "tool", folder=tmp_path)
    await run_program(*protoc(tmp_path), folder=tmp_path)
    await run_program(go, "build", "-o", "hello", ".", folder=tmp_path)

    assert (await run_program(tmp_path / "hello", address, folder=tmp_path)).out == printed


def protoc(folder: Path) -> list[str | Path]:
    """Return the command that generates the stubs."""
    command: list[str | Path] = [sys.executable, "-m", "grpc_tools.protoc"]
    command += [f"-I{path}" for path in INCLUDES]
    for kind in ("go", "go-grpc"):
        command += [f"--plugin={folder}/protoc-gen-{kind}", f"--{kind}_out={folder}"]
        command += [f"--{kind}_opt=module={MODULE}"]
        command += [f"--{kind}_opt=M{file}={MODULE}/roster/v1" for file in FILES]
    return [*command, *FILES]
