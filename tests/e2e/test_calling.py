"""The examples in other languages on docs/calling.md."""

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.clients import CHECKOUT, INCLUDES, NODE, installed
from tests.support.command import Ended, run, serving
from tests.support.go import build

PAGE = (CHECKOUT / "docs/calling.md").read_text()


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
        ended = await run_program(installed("node"), "hello.mjs", address, *INCLUDES, folder=tmp_path)
        assert ended.out == printed


@pytest.mark.skipif("ROSTER_TEST_GO" not in os.environ, reason="compiles for a minute: run `make test-go`")
async def test_go_example(address: str, tmp_path: Path) -> None:
    """It does the same with generated stubs."""
    program, printed = example("go")
    built = await build(program, tmp_path)

    assert (await run_program(built, address, folder=tmp_path)).out == printed
