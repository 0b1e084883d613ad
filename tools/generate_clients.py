"""Generate the code of the clients in Go and TypeScript from the protos, as buf.gen.yaml says.

`make clients` runs `python -m tools.generate_clients .`. It needs Go, and the node_modules of
clients/typescript.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import error_details_pb2

from tools.contract_image import write_image

CHECKOUT = Path(__file__).parents[1]
# What the servers put into errors. The Go library of gRPC has it.
DETAILS = "google/rpc/error_details.proto"
GOOGLEAPIS = Path(error_details_pb2.__file__).parents[2]
BUF = Path(sys.executable).with_name("buf")


def generate(out: Path) -> None:
    """Write the generated files below `out`, in the folders that they have in the checkout.

    Raises CalledProcessError; buf prints its messages on standard error.
    """
    with TemporaryDirectory() as folder:
        image = write_image(Path(folder) / "protos.binpb", comments=True)
        _remove_comments_of_others(image)
        _buf_generate(out, image, "--path", "roster")
        details = Path(folder) / "details.binpb"
        compiler = (sys.executable, "-m", "grpc_tools.protoc", f"-I{GOOGLEAPIS}", "--include_imports")
        subprocess.run([*compiler, f"--descriptor_set_out={details}", DETAILS], check=True)
        _buf_generate(out, details, "--path", DETAILS, "--template", "clients/typescript/buf.gen.yaml")


def _remove_comments_of_others(image: Path) -> None:
    """Leave only the comments of our own protos in an image."""
    files = FileDescriptorSet.FromString(image.read_bytes())
    for file in files.file:
        if not file.name.startswith("roster/"):
            file.ClearField("source_code_info")
    image.write_bytes(files.SerializeToString())


def _buf_generate(out: Path, image: Path, *options: str) -> None:
    subprocess.run([BUF, "generate", image, *options, "--output", out.resolve()], cwd=CHECKOUT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the code of the clients in Go and TypeScript.")
    parser.add_argument("out", type=Path)
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
