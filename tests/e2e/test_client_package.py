"""The distribution roster-client: it installs alone, in a caller's own environment."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from service.server import Server
from tests.support.command import run

CHECKOUT = Path(__file__).parents[2]
CLIENT = CHECKOUT / "clients/python"
GENERATED = shutil.ignore_patterns("__pycache__", "*_pb2*", "__init__.py", "py.typed")
NEEDED = {"grpcio", "protobuf", "googleapis-common-protos", "typing-extensions"}
# `make test-pythons` adds all versions of Python that it finds.
PYTHONS = [sys.executable, *os.environ.get("ROSTER_TEST_PYTHONS", "").split()]
FOLDER_NAMED_SERVICE = """
import roster.client, service
print(service.NAME)
"""


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """One database is enough: the client is independent of it."""
    return sqlite_url


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a checkout without generated stubs."""
    folder = tmp_path_factory.mktemp("build")
    checkout, dist = folder / "checkout", folder / "dist"
    shutil.copytree(CHECKOUT / "protos", checkout / "protos", ignore=GENERATED)
    shutil.copytree(CLIENT, checkout / "clients/python", ignore=shutil.ignore_patterns("__pycache__"))
    build(checkout / "clients/python", dist)
    return dist


def build(project: Path, dist: Path, *options: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(dist), *options]
    subprocess.run(command, cwd=project, check=True)


def wheel_of(dist: Path) -> Path:
    [wheel] = dist.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, str]:
    """Return the digest of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}


def test_indexes_would_show_it(dist: Path) -> None:
    """The README is rendered, and the metadata is complete."""
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)

    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout.count("PASSED") == 2


def test_sdist_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    """It has the protos, so that it needs nothing of the repository."""
    [sdist] = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = tmp_path.iterdir()
    build(unpacked, tmp_path / "dist", "--target", "wheel")

    assert contents(wheel_of(tmp_path / "dist")) == contents(wheel_of(dist))


@pytest.fixture(scope="module", params=PYTHONS)
def python(request: pytest.FixtureRequest, dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has only the client."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([request.param, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin/python"
    pip(python, "install", "--quiet", "--no-compile", str(wheel_of(dist)))
    return python


def pip(python: Path, *arguments: str) -> str:
    """Run the pip of the tests for another Python; return what it prints."""
    program = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    return subprocess.check_output([*program, *arguments], text=True)


@pytest.fixture(scope="module")
def distributions(python: Path) -> set[str]:
    """The names of what is installed there."""
    listed = pip(python, "list", "--format", "freeze")
    return set(re.findall(r"^([\w.-]+)==", listed, re.MULTILINE))


def test_needs_few_packages(distributions: set[str]) -> None:
    """Neither the service nor a database."""
    own = {name.replace("_", "-").lower() for name in distributions}
    assert own == {"roster-client", *NEEDED}


def test_leaves_the_name_service_to_its_callers(python: Path, tmp_path: Path) -> None:
    """A caller's own package of this name is imported."""
    (tmp_path / "service").mkdir()
    (tmp_path / "service/__init__.py").write_text('NAME = "the caller\'s"')
    (tmp_path / "program.py").write_text(FOLDER_NAMED_SERVICE)

    printed = subprocess.check_output([python, "program.py"], cwd=tmp_path, text=True)
    assert printed == "the caller's\n"


@pytest.mark.parametrize("example", ["calls.py", "blocking_calls.py", "bulk_load.py"])
async def test_examples_run_there(example: str, python: Path, server: Server) -> None:
    """With nothing else than the wheel."""
    ended = await run(python, CLIENT / "examples" / example, ROSTER_ADDRESS=server.address)

    assert (ended.status, ended.err) == (0, "")
    assert ended.out
