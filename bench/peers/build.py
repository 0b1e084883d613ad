"""`make bench-peers`: builds the load generator, and the peers whose toolchains are on this machine."""

import shutil
import subprocess
import sys
from pathlib import Path

import grpc_tools
from google.rpc import status_pb2

from tools.contract_image import write_image

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent
BUILT = ROOT / ".bench"
LOAD = BUILT / "go/generator"
GO_PEER = BUILT / "go/peer"
NODE_PEER = BUILT / "node/server.js"

MODULE = "example.org/peer"
FILES = [f"roster/v1/{name}.proto" for name in ("resources", "users", "posts", "bulk")]
INCLUDES = [
    ROOT / "protos",
    Path(grpc_tools.__file__).parent / "_proto",
    Path(status_pb2.__file__).parents[2],  # google/api and google/rpc
]


def build() -> None:
    """Build everything that can be built here; name the toolchains that are missing."""
    for program, make in {"go": build_go, "npm": build_node}.items():
        if shutil.which(program):
            make()
        else:
            print(f"{program} is not on PATH: what it builds is left out", file=sys.stderr)


def build_go() -> None:
    """Build the peer and the load generator, with stubs generated from the protos."""
    folder = shutil.copytree(SOURCES / "go", BUILT / "go", dirs_exist_ok=True)
    _run(folder, "go", "build", "-o", "./plugins/", "tool")
    protoc: list[str | Path] = [sys.executable, "-m", "grpc_tools.protoc"]
    image = write_image(folder / "contract.binpb", for_stubs=True)
    protoc += [f"--descriptor_set_in={image}"]
    for kind in ("go", "go-grpc"):
        protoc += [f"--plugin={folder}/plugins/protoc-gen-{kind}", f"--{kind}_out={folder}"]
        protoc += [f"--{kind}_opt=module={MODULE}"]
        protoc += [f"--{kind}_opt=M{file}={MODULE}/roster/v1" for file in FILES]
    _run(folder, *protoc, *FILES)
    _run(folder, "go", "build", "-o", GO_PEER, ".")
    _run(folder, "go", "build", "-o", LOAD, "./load")


def build_node() -> None:
    """Install the packages of the Node peer, and copy the protos that it reads when it starts."""
    folder = shutil.copytree(SOURCES / "node", BUILT / "node", dirs_exist_ok=True)
    for source in INCLUDES:
        for file in source.glob("*/**/*.proto"):
            target = folder / "protos" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    _run(folder, "npm", "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund")


def _run(folder: Path, *command: str | Path) -> None:
    subprocess.run(command, cwd=folder, check=True)


if __name__ == "__main__":
    build()
