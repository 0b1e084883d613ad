"""The build step that generates the stubs of `roster.v1` next to the protos, and packs them."""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc_tools
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorSet
from google.rpc import status_pb2
from grpc_tools import protoc
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# A stub has one class for both kinds of channels, but a type for each.
ASYNC_STUB = """

# The type of a {service}Stub on a channel of grpc.aio.
{service}AsyncStub = {service}Stub
"""
# The file that defines the rules of protovalidate.
RULES = "buf/validate/validate.proto"


def sources(protos: Path) -> list[str]:
    """Return the files of the contract, relative to `protos`; its other files are only imported."""
    return sorted(str(path.relative_to(protos)) for path in protos.glob("roster/**/*.proto"))


def describe(protos: Path) -> FileDescriptorSet:
    """Return the contract and its imports, with comments; raises SystemExit if it does not compile."""
    includes = [
        protos,
        Path(grpc_tools.__file__).parent / "_proto",
        Path(status_pb2.__file__).parents[2],  # google/api and google/rpc
    ]
    with TemporaryDirectory() as folder:
        image = Path(folder) / "contract.binpb"
        options = ["--include_imports", "--include_source_info", f"--descriptor_set_out={image}"]
        _protoc(*(f"-I{path}" for path in includes), *options, *sources(protos))
        return FileDescriptorSet.FromString(image.read_bytes())


def remove_import_of_rules(image: FileDescriptorSet) -> None:
    """Make a contract usable without the package of protovalidate, which callers need not install.

    The rules stay in the options of fields. Protobuf keeps options that it does not know, and protovalidate
    reads them there.
    """
    for file in image.file:
        if RULES in file.dependency:
            file.dependency.remove(RULES)
    kept = [file for file in image.file if file.name != RULES]
    del image.file[:]
    image.file.extend(kept)


def generate(protos: Path) -> None:
    """Write `*_pb2.py`, `*_pb2_grpc.py` and their types next to each proto of the contract in `protos`."""
    scripts = Path(sys.executable).parent
    # Without build isolation the plugins of mypy-protobuf are not on PATH.
    plugins = [
        f"--plugin={name}={scripts / name}"
        for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
        if (scripts / name).exists()
    ]
    outputs = [f"--{kind}_out={protos}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    image = describe(protos)
    remove_import_of_rules(image)
    for file in image.file:
        _clear_json_names(file.message_type)
    with TemporaryDirectory() as temporary:
        contract = Path(temporary) / "contract.binpb"
        contract.write_bytes(image.SerializeToString())
        _protoc(f"--descriptor_set_in={contract}", *plugins, *outputs, *sources(protos))
    for folder in {(protos / source).parent for source in sources(protos)}:
        (folder / "__init__.py").touch()
        (folder / "py.typed").touch()
        for stubs in folder.glob("*_pb2_grpc.py"):
            _name_async_stubs(stubs)


def _clear_json_names(messages: Iterable[DescriptorProto]) -> None:
    """Clear the JSON names of fields, which protoc adds to an image, and derives if they are missing.

    Stubs made from protos have none either. Clients of reflection print fields by their names in the proto
    only if there are none.
    """
    for message in messages:
        for field in message.field:
            field.ClearField("json_name")
        _clear_json_names(message.nested_type)


def _protoc(*arguments: str) -> None:
    if protoc.main(["protoc", *arguments]):
        raise SystemExit("protoc could not compile the contract; see its messages above")


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
        if not sources(protos):
            raise SystemExit(
                f"{protos} has no protos: build in a checkout of the repository, or from the sdist"
            )
        if self.target_name == "sdist":
            for proto in sorted(protos.rglob("*.proto")):
                build_data["force_include"][str(proto)] = f"protos/{proto.relative_to(protos)}"
            return
        generate(protos)
        if version == "standard":
            for made in sorted((protos / "roster/v1").iterdir()):
                if made.suffix in {".py", ".pyi", ".typed"}:
                    build_data["force_include"][str(made)] = f"roster/v1/{made.name}"
