"""Other versions of PostgreSQL than the one on this machine, from npm's packages in `tests/engines`.

https://github.com/leinelissen/embedded-postgres
"""

import json
from contextlib import suppress
from pathlib import Path

import pytest

ENGINES = Path(__file__).parents[1] / "engines"
VERSIONS = tuple(
    name.removeprefix("postgresql-")
    for name in json.loads((ENGINES / "package.json").read_text())["optionalDependencies"]
)


def engine(version: str) -> Path:
    """Return the folder with the programs of a major version; skips the test if it is missing."""
    package = ENGINES / "node_modules" / f"postgresql-{version}"
    if not (package / "native/bin/postgres").is_file():
        pytest.skip(
            f"PostgreSQL {version} is missing: run `make tools` on Linux (x86-64), and heed its warnings"
        )
    _link_libraries(package)
    return package / "native/bin"


def _link_libraries(package: Path) -> None:
    """Create the symlinks that the package lists; npm's packages can't contain any, and scripts don't run."""
    for link in json.loads((package / "native/pg-symlinks.json").read_text()):
        with suppress(FileExistsError):
            (package / link["target"]).symlink_to(Path(link["source"]).name)
