"""Contents of files: compressed in unusual ways, not what the name says, or changing."""

import gzip
import io
import json
import os
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.cli.compression import compress, decompress
from service.cli.formats import Csv, FileFormat, Json, Parquet, SourceError
from service.cli.source import Source
from service.cli.terminal import UsageError
from tests.support.files import columns_of, shown

HEADER, ADA, ALAN = b"email,full_name\n", b"ada@example.org,Ada\n", b"alan@example.org,Alan\n"
BOTH = ["email='ada@example.org' full_name='Ada'", "email='alan@example.org' full_name='Alan'"]
PEOPLE = [
    {"email": "ada@example.org", "full_name": "Ada"},
    {"email": "alan@example.org", "full_name": "Alan"},
]
FORMATS: list[Callable[..., FileFormat]] = [Csv, Json, Parquet]


async def rows_in(path: Path | str, kind: Callable[..., FileFormat] = Csv) -> list[str]:
    """Return the rows of a file as text."""
    source = Source(str(path), kind(columns_of()))
    return shown([row async for chunk in source.chunks(0) for row in chunk])


def zstd_frame(data: bytes) -> bytes:
    """Return a frame of zstd."""
    file = io.BytesIO()
    try:
        with compress(file, "users.csv.zst") as frame:
            frame.write(data)
    except UsageError:
        pytest.skip("the extra `zstd` is not installed")
    return file.getvalue()


def skippable_frame(data: bytes) -> bytes:
    """Return the frame that pzstd writes first: https://www.rfc-editor.org/rfc/rfc8878#section-3.1.2."""
    return b"\x50\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data


def tar(data: bytes) -> bytes:
    """Return an archive with one file."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as file:
        member = tarfile.TarInfo("users.csv")
        member.size = len(data)
        file.addfile(member, io.BytesIO(data))
    return archive.getvalue()


PARTS = {
    "gzip members": lambda: gzip.compress(HEADER + ADA) + gzip.compress(ALAN),
    "a member ends within a row": lambda: gzip.compress(HEADER + ADA[:9]) + gzip.compress(ADA[9:] + ALAN),
    "an empty member, as of a flush": lambda: (
        gzip.compress(HEADER + ADA) + gzip.compress(b"") + gzip.compress(ALAN)
    ),
    "zeros after the last member, as of tape blocks": lambda: gzip.compress(HEADER + ADA + ALAN) + bytes(512),
    "zstd frames": lambda: zstd_frame(HEADER + ADA) + zstd_frame(ALAN),
    "a skippable frame first, as of pzstd": lambda: (
        skippable_frame(b"\0\0\0\0") + zstd_frame(HEADER + ADA + ALAN)
    ),
    "a skippable frame between": lambda: zstd_frame(HEADER + ADA) + skippable_frame(b"x") + zstd_frame(ALAN),
}


@pytest.mark.parametrize("packed", PARTS.values(), ids=list(PARTS))
async def test_reads_all_parts_of_compressed_files(tmp_path: Path, packed: Callable[[], bytes]) -> None:
    """Files of several parts come from log rotation, parallel compressors and `cat`."""
    path = tmp_path / "users.csv.gz"
    path.write_bytes(packed())

    assert await rows_in(path) == BOTH


DAMAGED = {
    "text after the last gzip member": lambda: gzip.compress(HEADER + ADA) + b"garbage",
    "gzip without its end": lambda: gzip.compress(HEADER + ADA)[:-4],
    "text after the last zstd frame": lambda: zstd_frame(HEADER + ADA) + b"garbage",
    "zstd without its end": lambda: zstd_frame(HEADER + ADA * 999)[:-4],
}


@pytest.mark.parametrize("packed", DAMAGED.values(), ids=list(DAMAGED))
async def test_refuses_compressed_files_with_something_missing(
    tmp_path: Path, packed: Callable[[], bytes]
) -> None:
    """Data after the end could be rows, so it is not dropped with a warning, as gunzip does."""
    path = tmp_path / "users.csv.gz"
    path.write_bytes(packed())

    with pytest.raises(SourceError, match="the compressed data is damaged"):
        await rows_in(path)


OTHERS = {
    "an error page": (b"\n<!DOCTYPE html>\n<html><body>email</body></html>\n", "HTML or XML"),
    "an error page with a mark": (b"\xef\xbb\xbf<HTML lang='en'>\n<title>email</title>", "HTML or XML"),
    "an error of S3": (b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>', "HTML or XML"),
    "a bare error of S3": (b"<Error><Code>NoSuchKey</Code></Error>", "HTML or XML"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:665232916d12\nsize 146946961\n",
        "a pointer of Git LFS; download its content with `git lfs pull`",
    ),
    "an archive": (tar(HEADER + ADA + ALAN), "a tar archive; unpack it"),
    "Arrow": (b"ARROW1\0\0", "Arrow or Feather"),
    "encrypted Parquet": (b"PARE\0\0\0\0PARE", "encrypted Parquet"),
}


@pytest.mark.parametrize("packed", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("data", "expected"), OTHERS.values(), ids=list(OTHERS))
async def test_refuses_what_is_not_a_file_of_rows(
    tmp_path: Path, data: bytes, expected: str, kind: Callable[..., FileFormat], packed: Callable[..., bytes]
) -> None:
    """The name says nothing: curl saves an error page under any. No row of such a file is loaded."""
    path = tmp_path / "users"
    path.write_bytes(packed(data))

    with pytest.raises(SourceError, match=expected):
        await rows_in(path, kind)


async def test_a_file_may_begin_like_markup(tmp_path: Path) -> None:
    """A name in angle brackets is a name."""
    path = tmp_path / "users.csv"
    path.write_bytes(b"<full_name>,email\nAda,ada@example.org\n")

    assert await rows_in(path) == BOTH[:1]


async def test_refuses_a_file_compressed_twice(tmp_path: Path) -> None:
    """Web servers compress files that are compressed."""
    path = tmp_path / "users.csv.gz"
    path.write_bytes(gzip.compress(gzip.compress(HEADER + ADA)))

    with pytest.raises(SourceError, match="compressed twice; decompress it once: zcat FILE"):
        await rows_in(path)


def _parquet() -> bytes:
    pyarrow: Any = pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(PEOPLE), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


CONTENTS: dict[str, tuple[Callable[..., FileFormat], Callable[[], bytes]]] = {
    "CSV": (Csv, lambda: HEADER + ADA + ALAN),
    "CSV in UTF-16": (Csv, lambda: (HEADER + ADA + ALAN).decode().encode("utf-16")),
    "lines of JSON": (Json, lambda: b"".join(json.dumps(row).encode() + b"\n" for row in PEOPLE)),
    "lines of JSON in UTF-16": (
        Json,
        lambda: "".join(json.dumps(row) + "\n" for row in PEOPLE).encode("utf-16"),
    ),
    "array": (Json, lambda: json.dumps(PEOPLE, indent=1).encode()),
    "array in UTF-16": (Json, lambda: json.dumps(PEOPLE).encode("utf-16")),
    "object": (Json, lambda: json.dumps({"users": PEOPLE}).encode()),
    "Parquet": (Parquet, _parquet),
}


@pytest.mark.parametrize("packed", [bytes, gzip.compress, zstd_frame])
@pytest.mark.parametrize(("kind", "content"), CONTENTS.values(), ids=list(CONTENTS))
async def test_reads_every_format_to_its_end(
    tmp_path: Path,
    kind: Callable[..., FileFormat],
    content: Callable[[], bytes],
    packed: Callable[[bytes], bytes],
) -> None:
    """After the last row the file is still open, so that a change of it is noticed."""
    path = tmp_path / "users"
    path.write_bytes(packed(content()))

    assert await rows_in(path, kind) == BOTH


CHANGES: dict[str, Callable[[Path], object]] = {
    "grows": lambda path: _append(path, ALAN),
    "shrinks": lambda path: os.truncate(path, len(HEADER)),
    "rewritten with the same size": lambda path: os.utime(path, ns=(0, 0)),
}


@pytest.mark.parametrize("moment", ["before the first row", "after the first row"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
async def test_refuses_a_file_that_changes_while_it_is_read(
    tmp_path: Path, change: Callable[[Path], object], moment: str
) -> None:
    """The id of the load is that of the content before, and the last row may be half of one."""
    path = tmp_path / "users.csv"
    path.write_bytes(HEADER + ADA)
    source = Source(str(path), Csv(columns_of()))
    if moment == "before the first row":
        source.digest()
        change(path)
    else:
        rows = source._read()
        next(rows)
        change(path)
        source._rows = rows

    with pytest.raises(SourceError, match="the file has changed while it was read"):
        _ = [chunk async for chunk in source.chunks(0)]


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


async def test_refuses_a_file_that_another_has_replaced(tmp_path: Path) -> None:
    """The id of the load is that of the first one. Later, the open file keeps its content."""
    path, other = tmp_path / "users.csv", tmp_path / "new.csv"
    path.write_bytes(HEADER + ADA)
    other.write_bytes(HEADER + ALAN)
    source = Source(str(path), Csv(columns_of()))
    other.replace(path)

    with pytest.raises(SourceError, match="the file has changed while it was read"):
        _ = [chunk async for chunk in source.chunks(0)]


async def test_reads_a_pipe_by_its_name(tmp_path: Path) -> None:
    """As of a process substitution, <(…); its size and its end are not known."""
    path = tmp_path / "users.csv"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(HEADER + ADA + ALAN,))
    writer.start()

    assert await rows_in(path) == BOTH
    writer.join()


@pytest.mark.parametrize("packed", [gzip.compress, zstd_frame])
def test_knows_which_content_can_be_read_again(packed: Callable[[bytes], bytes]) -> None:
    """JSON documents are read twice if that is possible; a compressed pipe only looks as if it were."""

    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    assert decompress(io.BufferedReader(io.BytesIO(packed(HEADER)))).seekable()
    assert not decompress(io.BufferedReader(Pipe(packed(HEADER)))).seekable()
