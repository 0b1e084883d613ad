"""Compile the protos into one descriptor image, the input format of buf and of plugins of protoc.

buf alone does not find google/rpc; protoc finds it in the wheel of googleapis-common-protos.
`make contract` runs `python -m tools.contract_image protos/released.binpb` at a release.
"""

import argparse
from pathlib import Path

# With these, Python knows all other options than the rules.
from google.api import annotations_pb2, field_behavior_pb2, field_info_pb2  # noqa: F401

from clients.python.hatch_build import describe, remove_import_of_rules

PROTOS = Path(__file__).parents[1] / "protos"
RELEASED = PROTOS / "released.binpb"


def write_image(out: Path, protos: Path = PROTOS, *, comments: bool = False, for_stubs: bool = False) -> Path:
    """Compile the contract under `protos`, and its imports, into `out`; `comments` are optional.

    An image for stubs has no rules of protovalidate: code that is generated from it needs no package of
    protovalidate. Raises SystemExit.
    """
    image = describe(protos)
    if for_stubs:
        remove_import_of_rules(image)
        # protoc's generator for Java ends at options whose definition is not imported: the rules.
        image.DiscardUnknownFields()
    if not comments:
        for file in image.file:
            file.ClearField("source_code_info")
    out.write_bytes(image.SerializeToString(deterministic=True))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the protos into an image without comments.")
    parser.add_argument(
        "--for-stubs", action="store_true", help="with comments, without the rules of protovalidate"
    )
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write_image(arguments.out, comments=arguments.for_stubs, for_stubs=arguments.for_stubs)


if __name__ == "__main__":
    main()
