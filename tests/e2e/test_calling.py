"""The examples in other languages on docs/calling.md."""

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.clients import CHECKOUT
from tests.support.command import Ended, run, serving
from tests.support.languages import NEEDS_GO, build_go, install_packages, node

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


async def test_typescript_example(address: str, tmp_path: Path) -> None:
    """It creates a user, repeats the request, and prints the reason of an error."""
    program, printed = example("js")
    install_packages(tmp_path)
    (tmp_path / "hello.mjs").write_text(program)

    assert (await run_program(node(), "hello.mjs", address, folder=tmp_path)).out == printed


@NEEDS_GO
async def test_go_example(address: str, tmp_path: Path) -> None:
    """It does the same."""
    program, printed = example("go")
    (tmp_path / "hello.go").write_text(program)
    programs = build_go(tmp_path / "programs", tmp_path / "hello.go")

    assert (await run_program(programs / "hello", address, folder=tmp_path)).out == printed
