"""docs/adding-an-entity.md: its blocks, applied to a copy of the repository, make an entity that works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
PAGE = (CHECKOUT / "docs/adding-an-entity.md").read_text()
FOLDERS = ("alembic", "deploy", "protos", "service", "tests")
FILES = ("alembic.ini", "hatch_build.py", "pyproject.toml", "LICENSE", "README.md")
MADE = shutil.ignore_patterns("__pycache__", "*_pb2*", "node_modules")
BLOCK = re.compile(r"^```(diff|python|proto)\n(?:#|//) (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATE = "import pathlib, hatch_build; hatch_build.generate(pathlib.Path('protos'))"


def edited(text: str, hunk: str) -> str:
    """A text with the lines of a hunk, which has to fit at one place."""
    lines = hunk.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, hunk
    return text.replace(before, after)


def apply(folder: Path) -> None:
    """Make and edit the files that the page shows."""
    for kind, name, block in BLOCK.findall(PAGE):
        path = folder / name
        if kind == "diff":
            text = path.read_text()
            for hunk in block.split("@@\n"):
                text = edited(text, hunk)
            path.write_text(text)
        else:
            assert not path.exists()
            path.parent.mkdir(exist_ok=True)
            path.write_text(block if kind == "python" else f"// {name}\n{block}")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository with the page applied, and stubs made anew."""
    folder = tmp_path / "copy"
    for name in FOLDERS:
        shutil.copytree(CHECKOUT / name, folder / name, ignore=MADE)
    for name in FILES:
        shutil.copy(CHECKOUT / name, folder)
    apply(folder)
    run(folder, "-c", GENERATE)
    return folder


def run(folder: Path, *arguments: str) -> None:
    """Run Python in a copy, which has to succeed, on a SQLite of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{folder}/protos",
        "ROSTER_DATABASE_URL": f"sqlite:///{folder}/roster.db",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_makes_an_entity(copy: Path) -> None:
    """Its migration says what its model says, its contract, code and tests pass those of the repository."""
    run(copy, "-m", "service", "migrate")
    run(copy, "-m", "alembic", "check")
    run(copy, "-m", "ruff", "check", "service", "alembic", "tests/e2e/test_comments.py")
    run(copy, "-m", "ruff", "format", "--check", "service", "alembic", "tests/e2e/test_comments.py")
    run(
        copy,
        "-m",
        "pytest",
        "tests/e2e/test_comments.py",
        "tests/unit/test_contract.py",
        "tests/unit/test_policy.py",
    )


def test_a_hunk_that_fits_nowhere_is_told() -> None:
    """Nor one that fits twice: the page has gone stale."""
    for text in ("other\n", "line\nline\n"):
        with pytest.raises(AssertionError, match="line"):
            edited(text, " line\n+more\n")
