"""The generated code of the clients in Go and TypeScript is that of the contract."""

import shutil
from pathlib import Path

import pytest

from tools.generate_clients import CHECKOUT, generate

FOLDERS = [f"clients/{name}" for name in ("go/roster", "typescript/src/roster", "typescript/src/google")]


def read_files(root: Path) -> dict[str, str]:
    """Return the content of all generated files, by their paths."""
    files = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): path.read_text() for path in files}


def test_generated_code_is_up_to_date(tmp_path: Path) -> None:
    """`make clients` changes nothing, and no file is left over."""
    if not shutil.which("go"):
        pytest.skip("go is missing")
    if not (CHECKOUT / "clients/typescript/node_modules").is_dir():
        pytest.skip("clients/typescript/node_modules is missing: run `make tools`, and heed its warnings")
    generate(tmp_path)

    generated, committed = read_files(tmp_path), read_files(CHECKOUT)
    outdated = {path for path in generated | committed if generated.get(path) != committed.get(path)}
    assert outdated == set(), "run `make clients`"
    assert len(generated) == 17
