"""The files that the Makefile's commands check."""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


def lines_of(*command: str) -> list[str]:
    return subprocess.check_output(command, cwd=CHECKOUT, text=True).splitlines()


@pytest.mark.parametrize("target", ["lint", "format"])
def test_ruff_looks_at_our_files_only(target: str) -> None:
    """All of them, but not at a program that somebody tries in the checkout, as the README suggests."""
    if not (shutil.which("make") and shutil.which("git") and (CHECKOUT / ".git").exists()):
        pytest.skip("needs make, and a clone")
    own = {name for name in lines_of("git", "ls-files", "*.py") if not name.startswith("protos/")}
    commands = [shlex.split(line) for line in lines_of("make", "--dry-run", target) if "/ruff " in line]
    assert commands

    for program, _, *arguments in commands:
        sources = [name for name in arguments if not name.startswith("-")]
        files = lines_of(program, "check", "--show-files", *sources)
        looked_at = {str(Path(name).relative_to(CHECKOUT)) for name in files if name.endswith(".py")}
        assert own <= looked_at
        assert [name for name in looked_at if "/" not in name] == []
