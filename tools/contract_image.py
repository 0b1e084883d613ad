"""The contract as one descriptor image, the form in which buf reads it.

buf by itself can't find google/rpc; protoc finds it in the wheel of googleapis-common-protos.
`python -m tools.contract_image protos/released.binpb` keeps the contract as the released one.
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
    """Compile every proto under `protos` and what it imports into `out`, where wanted with the comments.

    Raises CalledProcessError; protoc's messages are on standard error.
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
    parser = argparse.ArgumentParser(description="Write the contract as an image, without comments.")
    parser.add_argument("out", type=Path)
    write_image(parser.parse_args().out)


if __name__ == "__main__":
    main()
