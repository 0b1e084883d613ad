"""The clients in Go and TypeScript, and programs that use them."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.clients import CHECKOUT, NODE, installed

GO = CHECKOUT / "clients/go"
TYPESCRIPT = CHECKOUT / "clients/typescript"
NEEDS_GO = pytest.mark.skipif(
    "ROSTER_TEST_GO" not in os.environ, reason="compiles for a minute: run `make test-go`"
)


def build_go(out: Path, *packages: str | Path, module: Path = GO) -> Path:
    """Build programs of a module into a folder, and return it; skips the test if Go is missing."""
    out.mkdir(exist_ok=True)
    subprocess.run([installed("go"), "build", "-C", module, "-o", f"{out}/", *packages], check=True)
    return out


def node() -> Path:
    """Return Node, for programs that use the client; skips the test if that is not built."""
    program = installed("node")
    built = TYPESCRIPT / "dist/index.js"
    if not built.exists():
        pytest.skip(f"{built} is missing: run `make tools`, and heed its warnings")
    sources = [*TYPESCRIPT.glob("src/**/*.ts"), *TYPESCRIPT.glob("examples/*.ts")]
    assert max(source.stat().st_mtime for source in sources) <= built.stat().st_mtime, "run `make tools`"
    return program


def install_packages(folder: Path) -> None:
    """Let the programs of a folder import the client, and the packages that examples need besides it."""
    if not (NODE / "node_modules").is_dir():
        pytest.skip(f"{NODE}/node_modules is missing: run `make tools`, and heed its warnings")
    modules = folder / "node_modules"
    modules.mkdir()
    (modules / "roster-client").symlink_to(TYPESCRIPT)
    for name in ("@bufbuild", "@grpc"):
        (modules / name).symlink_to(TYPESCRIPT / "node_modules" / name)
    (modules / "classic-level").symlink_to(NODE / "node_modules/classic-level")
