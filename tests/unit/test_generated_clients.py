"""The generated code of the clients in Go and TypeScript is that of the contract."""

import re
import shutil
from pathlib import Path

import pytest

from tools.generate_clients import CHECKOUT, generate

SERVICE = re.compile(r"^service (\w+)", re.MULTILINE)
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


def test_clients_have_every_service() -> None:
    """A service and a file that are added to the contract are added to both clients."""
    protos = sorted((CHECKOUT / "protos/roster/v1").glob("*.proto"))
    services = {name for proto in protos for name in SERVICE.findall(proto.read_text())}
    go, typescript, exports = (
        (CHECKOUT / "clients" / file).read_text()
        for file in ("go/client.go", "typescript/src/client.ts", "typescript/src/v1.ts")
    )

    assert services
    assert [name for name in services if f"rosterv1.New{name}Client(" not in go] == []
    assert [name for name in services if f"serviceClient({name}, " not in typescript] == []
    [retried] = re.findall(r"const SERVICES: .* = \[(.*)\];", typescript)
    assert set(retried.split(", ")) == services
    assert [proto.stem for proto in protos if f"/{proto.stem}_pb.js" not in exports] == []
