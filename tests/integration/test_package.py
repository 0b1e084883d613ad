"""The wheel has everything that an installed `roster` needs, and nothing else."""

import os
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from contextlib import closing
from pathlib import Path

import pytest

from service.db import revisions

CHECKOUT = Path(__file__).parents[2]
FOLDERS = ("service", "protos", "alembic")
FILES = ("alembic.ini", "hatch_build.py", "pyproject.toml", "README.md", "LICENSE", ".gitignore")
MADE = shutil.ignore_patterns("__pycache__", "*_pb2*", "py.typed")
MIGRATE = """
import sys
from service.db import migrations, revisions

migrations.upgrade(sys.argv[1])
print(migrations.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, built from a checkout without generated stubs."""
    checkout, dist, installed = (tmp_path_factory.mktemp(name) for name in ("checkout", "dist", "installed"))
    for name in FOLDERS:
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=MADE)
    for name in FILES:
        shutil.copy(CHECKOUT / name, checkout)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(dist)]
    subprocess.run(build, cwd=checkout, check=True)
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        wheel.extractall(installed)
    return installed


def test_wheel_has_the_stubs_with_their_types(installed: Path) -> None:
    """Clients get typed stubs of every proto."""
    protos = {path.stem for path in (CHECKOUT / "protos/roster/v1").glob("*.proto")}
    generated = {path.name for path in (installed / "roster/v1").iterdir()}
    stubs = {
        f"{name}_pb2{kind}.{ending}" for name in protos for kind in ("", "_grpc") for ending in ("py", "pyi")
    }
    assert generated >= stubs | {"__init__.py", "py.typed"}


def test_wheel_has_no_tests_and_no_tools(installed: Path) -> None:
    """It has only the two packages and their metadata."""
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == {"service", "roster"}


def test_installed_service_migrates_a_database(installed: Path, tmp_path: Path) -> None:
    """The wheel contains the migrations."""
    database = tmp_path / "roster.db"
    used = subprocess.check_output(
        [sys.executable, "-c", MIGRATE, f"sqlite+aiosqlite:///{database}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        text=True,
    )
    assert Path(used.strip()).is_relative_to(installed)
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT version_num FROM roster_schema").fetchall() == [(revisions.head(),)]
