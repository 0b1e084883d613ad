"""The build step that generates the stubs of `protos/roster` next to the protos."""

import sys
from pathlib import Path
from typing import Any

import grpc_tools
from google.rpc import status_pb2
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def generate(protos: Path) -> None:
    """Write `*_pb2.py`, `*_pb2_grpc.py` and their types next to each proto in `protos`."""
    scripts = Path(sys.executable).parent
    includes = [
        protos,
        Path(grpc_tools.__file__).parent / "_proto",
        Path(status_pb2.__file__).parents[2],  # google/rpc/*.proto
    ]
    sources = sorted(str(path.relative_to(protos)) for path in protos.rglob("*.proto"))
    # Without build isolation the plugins of mypy-protobuf are not on PATH.
    plugins = [
        f"--plugin={name}={scripts / name}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
        if (scripts / name).exists()
    ]
    failed = protoc.main(
        [
            "protoc",
            *(f"-I{path}" for path in includes),
            *plugins,
            f"--python_out={protos}",
            f"--grpc_python_out={protos}",
            f"--mypy_out={protos}",
            f"--mypy_grpc_out=only_async:{protos}",
            *sources,
        ]
    )
    if failed:
        raise SystemExit("protoc could not compile the contract; see its messages above")
    for folder in {(protos / source).parent for source in sources} | {protos / "roster"}:
        (folder / "__init__.py").touch()
        (folder / "py.typed").touch()


class StubsHook(BuildHookInterface[Any]):
    """Generates the stubs before hatchling builds a wheel or an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        generate(Path(self.root) / "protos")
