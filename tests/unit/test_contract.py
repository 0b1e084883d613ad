"""The contract: documented, in the agreed style, and compatible with the released one."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from google.api import annotations_pb2
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from tools.contract_image import PROTOS, RELEASED, write_image

BUF = Path(sys.executable).with_name("buf")  # the command of the wheel buf-bin
FULL_NAME = "  optional string full_name = 3;\n"
ANNOTATED = r"  optional string full_name = 3 \[[^;]*\];\n"


def buf(*arguments: str | Path) -> str:
    """Return the findings of buf, "" if there are none."""
    command = [BUF, *arguments, "--config", PROTOS / "buf.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    complaints = done.stdout + done.stderr
    assert bool(complaints) == bool(done.returncode), complaints
    return complaints


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A copy of the protos to break."""
    return Path(shutil.copytree(PROTOS, tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*")))


def edit(protos: Path, pattern: str, replacement: str) -> None:
    path = protos / "roster" / "v1" / "resources.proto"
    text, edits = re.subn(pattern, replacement, path.read_text(), count=1)
    assert edits == 1
    path.write_text(text)


def test_passes_lint_with_every_field_documented(tmp_path: Path) -> None:
    """The rules of buf include those on comments."""
    image = write_image(tmp_path / "now.binpb", comments=True)
    assert buf("lint", image) == ""


def test_lint_names_a_field_without_comment(edited: Path, tmp_path: Path) -> None:
    """A field that loses its comment fails the lint."""
    edit(edited, rf"(?:  //.*\n)+(?={ANNOTATED})", "")
    image = write_image(tmp_path / "edited.binpb", edited, comments=True)
    assert 'Field "full_name" should have a non-empty comment' in buf("lint", image)


def test_image_for_stubs_has_only_options_that_it_defines(tmp_path: Path) -> None:
    """The generator for Java in protoc ends at others."""
    image = FileDescriptorSet.FromString(write_image(tmp_path / "stubs.binpb", for_stubs=True).read_bytes())
    size = image.ByteSize()
    image.DiscardUnknownFields()
    assert image.ByteSize() == size
    methods = [method for file in image.file for service in file.service for method in service.method]
    assert any(method.options.HasExtension(annotations_pb2.http) for method in methods)


def test_is_compatible_with_released_contract(tmp_path: Path) -> None:
    """Clients of the released contract keep working."""
    image = write_image(tmp_path / "now.binpb", comments=True)
    assert buf("breaking", image, "--against", RELEASED) == ""


@pytest.mark.parametrize(
    "replacement",
    [
        pytest.param("", id="dropped"),
        pytest.param(FULL_NAME.replace("3", "30"), id="renumbered"),
        pytest.param(FULL_NAME.replace("full_name", "name"), id="renamed"),
        pytest.param(FULL_NAME.replace("string", "bytes"), id="retyped"),
    ],
)
def test_check_names_an_incompatible_field(edited: Path, tmp_path: Path, replacement: str) -> None:
    """The check itself can fail."""
    edit(edited, ANNOTATED, replacement)
    image = write_image(tmp_path / "edited.binpb", edited, comments=True)
    complaints = buf("breaking", image, "--against", RELEASED)
    assert '"full_name"' in complaints
    assert '"User"' in complaints


def test_released_image_has_no_comments() -> None:
    """The only binary file of the repository has just descriptors."""
    released = FileDescriptorSet.FromString(RELEASED.read_bytes())
    assert [file.name for file in released.file if file.HasField("source_code_info")] == []
