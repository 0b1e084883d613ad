"""The wheels have everything that an installed `roster` needs, and nothing else."""

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
FOLDERS = ("service", "protos", "alembic", "clients/python")
FILES = ("alembic.ini", "pyproject.toml", "README.md", "LICENSE", ".gitignore")
MADE = shutil.ignore_patterns("__pycache__", "*_pb2*", "py.typed")
MIGRATE = """
import sys
from service.db import migrations, revisions

migrations.upgrade(sys.argv[1])
print(migrations.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheels of the service and of its client, built from a checkout without generated stubs."""
    checkout, dist, installed = (tmp_path_factory.mktemp(name) for name in ("checkout", "dist", "installed"))
    for name in FOLDERS:
        shutil.copytree(CHECKOUT / name, checkout / name, ignore=MADE)
    for name in FILES:
        shutil.copy(CHECKOUT / name, checkout)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(dist)]
    for project in (checkout, checkout / "clients/python"):
        subprocess.run(build, cwd=project, check=True)
    for path in dist.glob("*.whl"):
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(installed / path.name.partition("-")[0])
    return installed


def test_wheel_has_the_stubs_with_their_types(installed: Path) -> None:
    """Clients get typed stubs of every proto."""
    protos = {path.stem for path in (CHECKOUT / "protos/roster/v1").glob("*.proto")}
    generated = {path.name for path in (installed / "roster_client/roster/v1").iterdir()}
    stubs = {
        f"{name}_pb2{kind}.{ending}" for name in protos for kind in ("", "_grpc") for ending in ("py", "pyi")
    }
    assert generated >= stubs | {"__init__.py", "py.typed"}


@pytest.mark.parametrize(("wheel", "package"), [("roster", "service"), ("roster_client", "roster")])
def test_wheel_has_no_tests_and_no_tools(installed: Path, wheel: str, package: str) -> None:
    """It has only one package and its metadata; no caller gets a package `service`."""
    names = [path.name for path in (installed / wheel).iterdir() if path.suffix != ".dist-info"]
    assert names == [package]


def test_installed_service_migrates_a_database(installed: Path, tmp_path: Path) -> None:
    """The wheel contains the migrations."""
    database = tmp_path / "roster.db"
    used = subprocess.check_output(
        [sys.executable, "-c", MIGRATE, f"sqlite+aiosqlite:///{database}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{installed}/roster{os.pathsep}{installed}/roster_client"},
        text=True,
    )
    assert Path(used.strip()).is_relative_to(installed)
    with closing(sqlite3.connect(database)) as connection:
        assert connection.execute("SELECT version_num FROM roster_schema").fetchall() == [(revisions.head(),)]
