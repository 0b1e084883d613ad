"""File formats: NDJSON and other JSON, CSV, and Parquet."""

from collections.abc import Callable, Mapping
from pathlib import Path

from service.cli.columns import Columns
from service.cli.compression import without_compression
from service.cli.formats.base import FileFormat, SourceError
from service.cli.formats.csv_file import Csv
from service.cli.formats.json_file import Json
from service.cli.formats.parquet_file import Parquet
from service.cli.terminal import UsageError

__all__ = [
    "FORMATS",
    "LOADED_ENDINGS",
    "STDIN",
    "Csv",
    "FileFormat",
    "Json",
    "Parquet",
    "SourceError",
    "format_name",
]

STDIN = "-"
FORMATS: Mapping[str, Callable[[Columns], FileFormat]] = {
    "ndjson": Json,
    "json": Json,
    "csv": Csv,
    "parquet": Parquet,
}
ENDINGS = {
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".json": "ndjson",
    ".csv": "csv",
    ".parquet": "parquet",
}
LOADED_ENDINGS = {**ENDINGS, ".tsv": "csv", ".txt": "csv"}
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
WORKBOOKS = (".xlsx", ".xlsm", ".xls", ".ods", ".numbers")


def format_name(file: str, endings: Mapping[str, str] = ENDINGS) -> str:
    """Return the format that the name of a file implies; raises UsageError if there is none."""
    ending = Path(without_compression(file.lower())).suffix
    if ending in WORKBOOKS:
        raise UsageError(f"{file} is a workbook; save the sheet as “CSV UTF-8”, and load that file")
    if ending in ARCHIVES:
        raise UsageError(f"{file} is an archive; unpack it, and load the file inside")
    if file != STDIN and ending not in endings:
        raise UsageError(f"the name of {file} does not imply a format; add --format")
    return endings.get(ending, "ndjson")
