"""Compile the protos into one descriptor image, the input format of buf.

buf alone does not find google/rpc; protoc finds it in the wheel of googleapis-common-protos.
`make contract` runs `python -m tools.contract_image protos/released.binpb` at a release.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from google.rpc import status_pb2

PROTOS = Path(__file__).parents[1] / "protos"
RELEASED = PROTOS / "released.binpb"
GOOGLEAPIS = Path(status_pb2.__file__).parents[2]


def write_image(out: Path, protos: Path = PROTOS, *, comments: bool = False) -> Path:
    """Compile every proto under `protos`, and its imports, into `out`; `comments` are optional.

    Raises CalledProcessError; protoc prints its messages on standard error.
    """
    sources = sorted(path.resolve() for path in protos.rglob("*.proto"))
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", f"-I{protos.resolve()}", f"-I{GOOGLEAPIS}"),
            *("--include_imports", f"--descriptor_set_out={out}"),
            *(["--include_source_info"] if comments else []),
            *sources,
        ],
        check=True,
    )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the protos into an image without comments.")
    parser.add_argument("out", type=Path)
    write_image(parser.parse_args().out)


if __name__ == "__main__":
    main()
