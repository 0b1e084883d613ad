"""Applies the blocks of a guide in docs/ to a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.postgres import Postgres

CHECKOUT = Path(__file__).parents[2]
FOLDERS = ("alembic", "clients/python", "deploy", "docs", "protos", "service", "tests", "tools")
FILES = ("alembic.ini", "pyproject.toml", "LICENSE", "README.md")
GENERATED = shutil.ignore_patterns("__pycache__", "*_pb2*", "node_modules")
BLOCK = re.compile(r"^```(diff|python|sh)\n# (\S+/\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GENERATE = """
import pathlib, sys
sys.path.append("clients/python")
import hatch_build
hatch_build.generate(pathlib.Path("protos"))
"""


def apply_hunk(text: str, hunk: str) -> str:
    """Return a text with a hunk applied, which must fit in exactly one place."""
    lines = hunk.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] in " -")
    after = "".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(before) == 1, hunk
    return text.replace(before, after)


def apply_block(folder: Path, kind: str, name: str, block: str) -> None:
    """Create or edit the file that a block shows; a command writes it.

    A name with a star is that of a migration, whose number the page does not know.
    """
    [path] = folder.glob(name) if "*" in name else [folder / name]
    if kind == "diff":
        text = path.read_text()
        for hunk in block.split("@@\n"):
            text = apply_hunk(text, hunk)
        path.write_text(text)
        return
    assert not path.exists()
    path.parent.mkdir(exist_ok=True)
    if kind == "sh":
        subprocess.run(["sh", "-c", block], cwd=folder, check=True)
        assert path.exists()
    else:
        path.write_text(block)


def apply_guide(page: str, folder: Path) -> None:
    """Copy the repository to a folder, apply a page of docs/ there, and generate the stubs."""
    for name in FOLDERS:
        shutil.copytree(CHECKOUT / name, folder / name, ignore=GENERATED)
    for name in FILES:
        shutil.copy(CHECKOUT / name, folder)
    for kind, name, block in blocks(page):
        if "*" not in name:
            apply_block(folder, kind, name, block)
    run_python(folder, "-c", GENERATE)


def edit_migrations(page: str, folder: Path) -> None:
    """Apply what a page changes in migrations that were generated."""
    for kind, name, block in blocks(page):
        if "*" in name:
            apply_block(folder, kind, name, block)


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Return the kind, the file and the text of each block of a page of docs/."""
    return [*BLOCK.findall((CHECKOUT / "docs" / page).read_text())]


def run_python(folder: Path, *arguments: str, **variables: str) -> None:
    """Run Python in a copy of the repository, on a SQLite database there; it must succeed."""
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join(f"{folder}/{path}" for path in ("", "protos", "clients/python/src")),
        "ROSTER_DATABASE_URL": f"sqlite:///{folder}/roster.db",
    }
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def run_tests(folder: Path, postgres: Postgres, *tests: str) -> None:
    """Run tests of a copy of the repository, with databases on a running server."""
    url = postgres.url.render_as_string(hide_password=False)
    run_python(folder, "-m", "pytest", *tests, ROSTER_TEST_DATABASE_URL=url)
