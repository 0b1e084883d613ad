"""Files of tests/data/field/users, which other programs wrote, read as `roster load` reads them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import click
import pytest
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from roster.v1.resources_pb2 import User
from service.cli.formats import FORMATS, LOADED_ENDINGS, Csv, FileFormat, Parquet, SourceError, format_name
from service.cli.rows import Row
from service.cli.source import Source
from tests.support.field import FOLDER, PEOPLE
from tests.support.files import columns_of

NOT_DATA = {"README.md", "people.json", "make.py", "make_models.py", "make_keycloak.sh", "make_firebase.js"}
# Ids of people with special names.
QUOTED, UMLAUT, NO_NAME, NAMED_NULL, CHINESE, TWO_LINES, INCHES = 1, 2, 4, 5, 8, 9, 10


@dataclass
class Case:
    """A file, how it is read, and what is in it: the people except for some, and rows that fail."""

    file: str
    without: Sequence[int] = ()
    failures: Sequence[str] = ()
    restore: bool = False
    names: Mapping[int, str | None] = field(default_factory=dict)
    further: Sequence[User] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def expected(self) -> list[Message]:
        """Return the users in the file."""
        names = ["email", "full_name", "is_active", *(["id", "created_at"] if self.restore else [])]
        users: list[Message] = []
        for person in PEOPLE:
            if person["id"] not in self.without:
                values = {**person, "created_at": _timestamp(person["created_at"])}
                values["full_name"] = self.names.get(person["id"], person["full_name"])
                users.append(User(**{name: values[name] for name in names}))
        return [*users, *self.further]


def _timestamp(text: str) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromJsonString(text)
    return timestamp


NULL = "full_name contains {}. If it means no value, add --null {}; if it is text, put it in quotes"
ESCAPED = "full_name seems to contain a character that is escaped with a backslash"
MISQUOTED = "text follows a closing quote; a quote inside a quoted cell is written twice"
NOT_UTF_8 = "the row is not UTF-8; save the file as UTF-8, or add --encoding"
NAIVE = "created_at must be a time with a time zone"
CELLS = "the row has {} cells, but the header has 3"

CASES = [
    Case("bigquery.csv", restore=True),
    Case("bigquery.json", restore=True),
    # csvkit itself takes Null for null, unless it is called with --blanks.
    Case("csvkit-in2csv.csv", names={NAMED_NULL: None}),
    Case("csvkit-lines.json", names={NAMED_NULL: None}),
    Case("csvkit-tab.csv"),
    Case("csvkit.json", names={NAMED_NULL: None}),
    Case("duckdb-blob.parquet"),
    Case("duckdb.csv", restore=True),
    Case("duckdb.csv.gz", restore=True),
    Case("duckdb.json", restore=True),
    Case("duckdb.ndjson", restore=True),
    Case("duckdb.parquet", restore=True),
    Case("excel-macintosh.csv", [CHINESE, TWO_LINES], options={"encoding": "mac_roman"}),
    Case("excel-macintosh.csv", [UMLAUT, CHINESE, TWO_LINES], [NOT_UTF_8]),
    Case("excel-semicolon.csv", [CHINESE], options={"encoding": "cp1252"}),
    Case("excel-semicolon.csv", [UMLAUT, CHINESE], [NOT_UTF_8]),
    Case("excel-sep.csv"),
    Case("excel-totals.csv", [CHINESE, TWO_LINES], further=[User(email="Total", full_name="8")]),
    Case("excel-trailing.csv", [CHINESE, TWO_LINES]),
    Case("excel-unicode.txt"),
    Case("excel-utf8.csv"),
    Case("excel-german.csv", range(11), ["is_active must be true or false"] * 10),
    Case("fastparquet.parquet"),
    Case("google-sheets.csv"),
    Case("google-sheets.tsv", [CHINESE, TWO_LINES]),
    Case("jq-csv.csv"),
    Case("jq-pretty.json"),
    Case("jq-tsv.tsv", [TWO_LINES], [ESCAPED]),
    Case("jq.ndjson"),
    Case("libreoffice-cp1252.csv", names={CHINESE: "???"}, options={"encoding": "cp1252"}),
    Case("libreoffice-quoted.csv"),
    Case("libreoffice-semicolon.csv"),
    Case("libreoffice-utf16.txt"),
    Case("libreoffice.csv"),
    Case("mariadb-json.ndjson"),
    Case("mariadb-batch.tsv", [NO_NAME, TWO_LINES], [NULL.format("NULL", "NULL"), ESCAPED]),
    Case("mariadb-batch.tsv", [TWO_LINES], [ESCAPED], options={"null": ["NULL"]}),
    Case(
        "mariadb-outfile-plain.csv",
        [QUOTED, INCHES],
        [MISQUOTED, MISQUOTED],
        options={"null": ["NULL"]},
    ),
    Case(
        "mariadb-outfile-standard.csv",
        [NO_NAME, TWO_LINES],
        [MISQUOTED, CELLS.format(2), CELLS.format(2)],
    ),
    Case(
        "mariadb-outfile.csv",
        [QUOTED, NO_NAME, TWO_LINES, INCHES],
        [MISQUOTED, NULL.format(r"\N", r"'\N'"), ESCAPED, MISQUOTED],
    ),
    Case("pandas-astype.csv"),
    Case("pandas-index.csv"),
    Case("pandas-lines.json"),
    Case("pandas-na.csv", [NO_NAME], [NULL.format("NA", "NA")]),
    Case("pandas-na.csv", options={"null": ["NA"]}),
    Case("pandas-naive.parquet"),
    Case("pandas-naive.parquet", range(11), [NAIVE] * 10, restore=True),
    Case("pandas-nan.parquet", restore=True),
    Case("pandas-nanoseconds.parquet", restore=True),
    Case("pandas-quoted.csv", names={NO_NAME: ""}),
    Case("pandas-records.json"),
    Case("pandas-restore.csv", restore=True),
    Case("pandas-restore.parquet", restore=True),
    Case("pandas-table.json"),
    Case("pandas-columns.json", range(11), ["email must be a string"]),
    Case("pandas-utf16.csv"),
    Case("pandas.csv"),
    Case("pandas.csv.gz"),
    Case("pandas.csv.zst"),
    Case("polars-bom.csv", restore=True),
    Case("polars.csv", restore=True),
    Case("polars.json"),
    Case("polars.ndjson", restore=True),
    Case("polars.parquet", restore=True),
    # Export-Csv of PowerShell 5 writes ASCII, and loses the other characters.
    Case("powershell-5.csv", names={UMLAUT: "J?rgen M?ller, Dr.", CHINESE: "???"}),
    Case("powershell-5-unicode.csv"),
    Case("powershell-5-utf8.csv"),
    Case("powershell-7.csv"),
    Case("powershell.json"),
    Case("psql-agg.json"),
    Case("psql-berlin.csv", restore=True),
    Case("psql-csv.csv"),
    Case("psql-forced.csv", restore=True),
    Case("psql-null.csv", [NO_NAME], [NULL.format(r"\N", r"'\N'")], restore=True),
    Case("psql-null.csv", options={"null": [r"\N"]}, restore=True),
    Case("psql-row.ndjson"),
    Case("psql-text.txt", [NO_NAME, TWO_LINES], [NULL.format(r"\N", r"'\N'"), ESCAPED], restore=True),
    Case("psql-unaligned.txt", range(7, 11), ["the row has 1 cell, but the header has 3"]),
    Case("psql.csv", restore=True),
    Case("pyarrow-upper.parquet", restore=True),
    Case("pyarrow.parquet", restore=True),
    Case("python-ascii.json"),
    Case("python-escape.csv", [QUOTED, INCHES], [ESCAPED, ESCAPED]),
    Case("python-excel-tab.csv"),
    Case("python-excel.csv"),
    Case("python-indent.json"),
    Case("python-nan.json"),
    Case("python-nonnumeric.csv", names={NO_NAME: ""}),
    Case("python-unix.csv", names={NO_NAME: ""}),
    Case("r-csv2.csv", options={"null": ["NA"]}),
    Case("r-plain.csv"),
    Case("r-table.txt", range(11), [MISQUOTED, *[CELLS.format(4)] * 8, "a quote is never closed"]),
    Case("r.csv", [NO_NAME], [NULL.format("NA", "NA")]),
    Case("r.csv", options={"null": ["NA"]}),
    Case("redshift.csv", range(7, 11)),
    Case(
        "snowflake-unload.csv",
        [UMLAUT, NO_NAME, TWO_LINES],
        [CELLS.format(4), NULL.format(r"\N", r"'\N'"), CELLS.format(2), CELLS.format(2)],
    ),
    Case("snowflake.csv", restore=True),
    Case("spark-csv-standard.csv"),
    Case("spark-csv.csv", [QUOTED, INCHES], [MISQUOTED, "a quote is never closed"]),
    Case("spark-json-gzip.json.gz"),
    Case("spark-json.json"),
    Case("spark-parquet-binary.snappy.parquet"),
    Case("spark-parquet-micros.snappy.parquet", restore=True),
    Case("spark-parquet.snappy.parquet"),
    Case("spark-parquet.snappy.parquet", range(11), [NAIVE] * 10, restore=True),
    Case("sql-server.csv", [UMLAUT, TWO_LINES], options={"null": ["NULL"]}),
    Case("sqlite3-list.txt", range(7, 11)),
    Case("sqlite3-tabs.tsv", range(5, 11)),
    Case("sqlite3.csv"),
    Case("sqlite3.json"),
]
WORKBOOK = "is a workbook; save the sheet as “CSV UTF-8”, and load that file"
SCREEN = "the file is aligned table output, not CSV; export it as CSV, such as with psql --csv"
NONE = "the first row has none of the columns email, full_name, is_active, hashed_password, password; it has "
REFUSED = {
    "auth0-passwords.ndjson": 'the columns "name" and "given_name" and "family_name" are not known',
    "auth0.csv": 'the columns "name" and "given_name" and "family_name" are not known',
    "auth0.ndjson": 'the columns "name" and "given_name" and "family_name" are not known',
    "cognito.json": "the first row has none of the columns email",
    "django-dumpdata.json": f"{NONE}model, pk, fields",
    "django-dumpdata.jsonl": f"{NONE}model, pk, fields",
    "excel-title.csv": "it has Staff 2026, , ; if line 3 is the header, delete the lines above it",
    "firebase-accounts.json": 'column "passwordHash" is not known. If it is hashed_password, add --columns',
    "firebase-export.csv": "if this is a row, add a header line such as email,full_name",
    "firebase-export.json": 'the column "passwordHash" is not known. If it is hashed_password, add --columns',
    "firebase-parameters.json": f"{NONE}base64_signer_key",
    "keycloak-argon2.json": 'the columns "firstName" and "lastName" are not known',
    "keycloak-pbkdf2-sha256.json": 'the columns "firstName" and "lastName" are not known',
    "keycloak-pbkdf2-sha512.json": 'the columns "firstName" and "lastName" are not known',
    "keycloak-users.json": 'the columns "firstName" and "lastName" are not known',
    "kratos.json": f"{NONE}id, schema_id",
    "libreoffice.ods": WORKBOOK,
    "libreoffice.xls": WORKBOOK,
    "mariadb-table.txt": SCREEN,
    "okta.json": "the first row has none of the columns email",
    "pandas-split.json": "the object has several arrays",
    "pandas.xlsx": WORKBOOK,
    "psql-aligned.txt": SCREEN,
    "pyarrow.arrow": "does not imply a format; add --format",
    "sqlcmd.txt": SCREEN,
    "sqlite3-box.txt": SCREEN,
    "sqlite3-column.txt": SCREEN,
    "sqlite3-markdown.txt": SCREEN,
    "sqlite3.db": "does not imply a format; add --format",
    "supabase.csv": 'the column "encrypted_password" is not known. If it is hashed_password, add --columns',
}


async def rows_of(case: Case) -> list[Row[Any]]:
    """Return the rows of a file; raises UsageError, SourceError."""
    columns = columns_of(operation="restore" if case.restore else "create")
    kind = FORMATS[format_name(case.file, LOADED_ENDINGS)]
    if kind is Parquet:
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    if case.file.endswith(".zst") and sys.version_info < (3, 14):
        pytest.importorskip("backports.zstd", reason="the extra `zstd` is not installed")
    file_format: FileFormat = Csv(columns, **case.options) if kind is Csv else kind(columns)
    source = Source(str(FOLDER / case.file), file_format)
    return [row async for chunk in source.chunks(0) for row in chunk]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.file)
async def test_reads_what_the_program_wrote(case: Case) -> None:
    """Each person is there with the same values, or fails with a reason."""
    rows = await rows_of(case)

    assert [row.message for row in rows if row.message] == case.expected()
    failures = [row.failure.message for row in rows if row.failure]
    assert len(failures) == len(case.failures)
    for failure, reason in zip(failures, case.failures, strict=True):
        assert reason in failure


@pytest.mark.parametrize("file", REFUSED)
async def test_refuses_a_file_with_a_sentence_that_says_what_to_do(file: str) -> None:
    """No row of a file that is not understood is read."""
    with pytest.raises((SourceError, click.ClickException)) as raised:
        await rows_of(Case(file))

    assert REFUSED[file] in getattr(raised.value, "message", str(raised.value))


def test_every_file_is_read_and_described() -> None:
    """README.md says where each file comes from."""
    files = {path.name for path in FOLDER.iterdir()} - NOT_DATA

    assert files == {case.file for case in CASES} | {*REFUSED}
    readme = (FOLDER / "README.md").read_text()
    assert {file for file in files if f"`{file}`" not in readme} == set()
