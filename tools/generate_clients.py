"""Generate the code of the clients in Go and TypeScript from the protos, as buf.gen.yaml says.

`make clients` runs `python -m tools.generate_clients .`. It needs Go, and the node_modules of clients/typescript.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.contract_image import write_image

CHECKOUT = Path(__file__).parents[1]
BUF = Path(sys.executable).with_name("buf")


def generate(out: Path) -> None:
    """Write the generated files below `out`, in the folders that they have in the checkout.

    Raises CalledProcessError; buf prints its messages on standard error.
    """
    with TemporaryDirectory() as folder:
        image = write_image(Path(folder) / "protos.binpb", comments=True)
        subprocess.run([BUF, "generate", image, "--path", "roster", "--output", out.resolve()], cwd=CHECKOUT, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Generate the code of the clients in Go and TypeScript.")
    parser.add_argument("out", type=Path)
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
