"""The build step that generates the stubs of `roster.v1` next to the protos, and packs them."""

import re
import sys
from pathlib import Path
from typing import Any

import grpc_tools
from google.rpc import status_pb2
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# A stub has one class for both kinds of channels, but a type for each.
ASYNC_STUB = """

# The type of a {service}Stub on a channel of grpc.aio.
{service}AsyncStub = {service}Stub
"""


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
            f"--mypy_grpc_out={protos}",
            *sources,
        ]
    )
    if failed:
        raise SystemExit("protoc could not compile the contract; see its messages above")
    for folder in {(protos / source).parent for source in sources}:
        (folder / "__init__.py").touch()
        (folder / "py.typed").touch()
        for stubs in folder.glob("*_pb2_grpc.py"):
            _name_async_stubs(stubs)


def _name_async_stubs(stubs: Path) -> None:
    """Define the classes that the types of the stubs have in addition, so that programs can import them."""
    text = stubs.read_text()
    services = re.findall(r"^class (\w+)Stub\b", text, re.MULTILINE)
    stubs.write_text(text + "".join(ASYNC_STUB.format(service=service) for service in services))


class StubsHook(BuildHookInterface[Any]):
    """Generates the stubs before hatchling builds a wheel or an editable installation.

    The protos are those of the repository; in an sdist, its own copy of them.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        packed, shared = Path(self.root) / "protos", Path(self.root).parents[1] / "protos"
        protos = packed if packed.exists() else shared
        if self.target_name == "sdist":
            for proto in sorted(protos.rglob("*.proto")):
                build_data["force_include"][str(proto)] = f"protos/{proto.relative_to(protos)}"
            return
        generate(protos)
        if version == "standard":
            for made in sorted((protos / "roster/v1").iterdir()):
                if made.suffix in {".proto", ".py", ".pyi", ".typed"}:
                    build_data["force_include"][str(made)] = f"roster/v1/{made.name}"
