"""Writes the files of this folder with real programs; README.md lists their versions.

Usage, in a scratch virtual environment: `PYTHONPATH=ROOT python tests/data/field/users/make.py [NAME...]`.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from pathlib import Path

FOLDER = Path(__file__).parent
PEOPLE = json.loads((FOLDER / "people.json").read_text())
NAMES = ["id", "email", "full_name", "is_active", "created_at"]
SHORT = NAMES[1:4]
TABLE = (
    "create table people (id bigint, email text, full_name text, is_active boolean, created_at timestamptz)"
)


def times() -> list[datetime]:
    """Return the times of all people."""
    return [datetime.fromisoformat(person["created_at"]) for person in PEOPLE]


def column(name: str) -> list:
    """Return a column of the people."""
    return times() if name == "created_at" else [person[name] for person in PEOPLE]


def literal(value: object) -> str:
    """Return a value as SQL has it."""
    if value is None:
        return "null"
    return str(value) if isinstance(value, bool | int) else "'" + str(value).replace("'", "''") + "'"


def inserts() -> str:
    """Return the people as a statement of SQL."""
    rows = (", ".join(literal(person[name]) for name in NAMES) for person in PEOPLE)
    return f"insert into people values {', '.join(f'({row})' for row in rows)}"


def run(*command: str | Path, cwd: Path | None = None, stdin: str | None = None, **variables: str) -> str:
    """Run a program and return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        input=None if stdin is None else stdin.encode(),
        cwd=cwd,
        env={**os.environ, **variables},
        check=True,
        capture_output=True,
    )
    return done.stdout.decode()


def write(name: str, text: str) -> None:
    """Write a file without changing line ends."""
    (FOLDER / name).write_bytes(text.encode())


def pandas() -> None:
    """DataFrame.to_csv, to_json, to_parquet, to_excel."""
    import pandas as pd

    frame = pd.DataFrame({name: column(name) for name in NAMES})
    short = frame[SHORT]
    short.to_csv(FOLDER / "pandas.csv", index=False)
    short.to_csv(FOLDER / "pandas-index.csv")
    short.to_csv(FOLDER / "pandas-quoted.csv", index=False, quoting=csv.QUOTE_ALL)
    short.to_csv(FOLDER / "pandas-na.csv", index=False, na_rep="NA")
    short.to_csv(FOLDER / "pandas-utf16.csv", index=False, sep=";", encoding="utf-16")
    short.to_csv(FOLDER / "pandas.csv.gz", index=False)
    short.to_csv(FOLDER / "pandas.csv.zst", index=False)
    # A column that once had a missing value, as after a merge, is one of floats: 7.0.
    floats = frame.assign(id=frame["id"].astype(float))
    floats.assign(is_active=frame["is_active"].astype(float)).to_csv(
        FOLDER / "pandas-restore.csv", index=False
    )
    short.to_json(FOLDER / "pandas-records.json", orient="records")
    short.to_json(FOLDER / "pandas-lines.json", orient="records", lines=True)
    short.to_json(FOLDER / "pandas-columns.json")
    short.to_json(FOLDER / "pandas-split.json", orient="split")
    short.to_json(FOLDER / "pandas-table.json", orient="table")
    floats.to_parquet(FOLDER / "pandas-restore.parquet")
    frame.assign(created_at=frame["created_at"].dt.as_unit("ns")).to_parquet(
        FOLDER / "pandas-nanoseconds.parquet"
    )
    frame.assign(created_at=frame["created_at"].dt.tz_localize(None)).to_parquet(
        FOLDER / "pandas-naive.parquet"
    )
    strange = frame.assign(full_name=[name or float("nan") for name in column("full_name")])
    strange.astype({"full_name": object}).to_parquet(FOLDER / "pandas-nan.parquet", engine="pyarrow")
    short.to_excel(FOLDER / "pandas.xlsx", index=False)
    short.astype(str).to_csv(FOLDER / "pandas-astype.csv", index=False)


def polars() -> None:
    """DataFrame.write_csv, write_json, write_ndjson, write_parquet."""
    import polars as pl

    frame = pl.DataFrame({name: column(name) for name in NAMES})
    frame.write_csv(FOLDER / "polars.csv")
    frame.write_csv(FOLDER / "polars-bom.csv", include_bom=True, separator="\t", line_terminator="\r\n")
    frame.select(SHORT).write_json(FOLDER / "polars.json")
    frame.write_ndjson(FOLDER / "polars.ndjson")
    frame.write_parquet(FOLDER / "polars.parquet")


def duckdb() -> None:
    """COPY … TO."""
    import duckdb as db

    connection = db.connect()
    connection.execute("set timezone = 'UTC'")
    connection.execute(TABLE)
    connection.execute(inserts())
    connection.execute(f"copy people to '{FOLDER}/duckdb.csv'")
    connection.execute(f"copy people to '{FOLDER}/duckdb.csv.gz'")
    connection.execute(f"copy people to '{FOLDER}/duckdb.ndjson' (format json)")
    connection.execute(f"copy people to '{FOLDER}/duckdb.json' (format json, array true)")
    connection.execute(f"copy people to '{FOLDER}/duckdb.parquet'")
    # BLOB, as Spark and Impala write text; HUGEINT, which Parquet has as a float; ENUM, as a dictionary.
    connection.execute(
        f"copy (select id::hugeint id, email::blob email, encode(full_name) full_name, is_active::int is_active "
        f"from people) to '{FOLDER}/duckdb-blob.parquet'"
    )


def arrow() -> None:
    """pyarrow.parquet.write_table with types that pandas does not write."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = column("full_name")
    table = pa.table(
        {
            "id": pa.array(map(Decimal, column("id")), pa.decimal128(38, 0)),
            "email": pa.array([email.encode() for email in column("email")], pa.binary()),
            "full_name": pa.array(names, pa.large_string()).dictionary_encode(),
            "is_active": pa.array(map(int, column("is_active")), pa.uint8()),
            "created_at": pa.array(times(), pa.timestamp("us", "Europe/Berlin")),
            "last_login": pa.array([10**18] * len(names), pa.timestamp("us")),
            "until": pa.array([2**31 - 1] * len(names), pa.date32()),
            "tags": pa.array([["a"]] * len(names)),
        }
    )
    pq.write_table(table, FOLDER / "pyarrow.parquet", compression="zstd")
    table = pa.table(
        {
            "ID": pa.array(column("id"), pa.uint64()),
            "EMAIL": pa.array(column("email")),
            "FULL_NAME": pa.array([name and name.encode() for name in names], pa.large_binary()),
            "IS_ACTIVE": pa.array(map(float, column("is_active"))),
            "CREATED_AT": pa.array(times(), pa.timestamp("us", "UTC")).cast(pa.timestamp("ns", "UTC")),
        }
    )
    pq.write_table(table, FOLDER / "pyarrow-upper.parquet", version="1.0", use_dictionary=False)
    (FOLDER / "pyarrow.arrow").unlink(missing_ok=True)
    with (
        pa.OSFile(str(FOLDER / "pyarrow.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)


def fastparquet() -> None:
    """fastparquet.write, which marks text as UTF8 in the old way."""
    import fastparquet as fp
    import pandas as pd

    frame = pd.DataFrame({name: pd.Series(column(name), dtype=object) for name in SHORT[:2]})
    frame["is_active"] = column("is_active")
    fp.write(
        str(FOLDER / "fastparquet.parquet"), frame, object_encoding={"email": "utf8", "full_name": "utf8"}
    )


def python() -> None:
    """The csv module's dialects, and json."""
    rows = [[person[name] for name in SHORT] for person in PEOPLE]
    for name, options in {
        "python-excel": {"dialect": "excel"},
        "python-excel-tab": {"dialect": "excel-tab"},
        "python-unix": {"dialect": "unix"},
        "python-nonnumeric": {"quoting": csv.QUOTE_NONNUMERIC},
    }.items():
        with (FOLDER / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file, **options).writerows([SHORT, *rows])
    with (FOLDER / "python-escape.csv").open("w", newline="") as file:
        csv.writer(file, doublequote=False, escapechar="\\").writerows([SHORT, *rows])
    people = [{name: person[name] for name in SHORT} for person in PEOPLE]
    write("python-indent.json", json.dumps({"count": len(people), "results": people}, indent=4))
    write("python-ascii.json", json.dumps(people))
    write(
        "python-nan.json",
        json.dumps([{**person, "full_name": person["full_name"] or float("nan")} for person in people]),
    )


def sqlite() -> None:
    """The sqlite3 command, and csvkit."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "people.db"
        run("sqlite3", file, stdin=f"{TABLE};{inserts()};")
        query = "select email, full_name, is_active from people"
        write("sqlite3.csv", run("sqlite3", "-header", "-csv", file, query))
        write("sqlite3.json", run("sqlite3", "-json", file, query))
        write("sqlite3-list.txt", run("sqlite3", "-header", "-list", file, query + " where id < 7"))
        write("sqlite3-tabs.tsv", run("sqlite3", "-header", "-tabs", file, query + " where id < 5"))
        write("sqlite3-box.txt", run("sqlite3", "-box", file, query))
        write("sqlite3-column.txt", run("sqlite3", "-header", "-column", file, query))
        write("sqlite3-markdown.txt", run("sqlite3", "-markdown", file, query))
        shutil.copy(file, FOLDER / "sqlite3.db")
    programs = Path(sys.executable).parent
    write("csvkit-tab.csv", run(programs / "csvformat", "-T", FOLDER / "sqlite3.csv"))
    write("csvkit.json", run(programs / "csvjson", "-I", FOLDER / "sqlite3.csv"))
    write("csvkit-lines.json", run(programs / "csvjson", "-I", "--stream", FOLDER / "sqlite3.csv"))
    write("csvkit-in2csv.csv", run(programs / "in2csv", "-I", FOLDER / "pandas.xlsx"))


def jq() -> None:
    """The jq command."""
    write("jq.ndjson", run("jq", "-c", ".results[]", FOLDER / "python-indent.json"))
    write("jq-pretty.json", run("jq", ".results[]", FOLDER / "python-indent.json"))
    write(
        "jq-csv.csv",
        run(
            "jq",
            "-r",
            '["email","full_name","is_active"], (.results[] | [.email, .full_name, .is_active]) | @csv',
            FOLDER / "python-indent.json",
        ),
    )
    write(
        "jq-tsv.tsv",
        run(
            "jq",
            "-r",
            '["email","full_name","is_active"], (.results[] | [.email, .full_name, .is_active]) | @tsv',
            FOLDER / "python-indent.json",
        ),
    )


def postgresql() -> None:
    """Psql: copy, COPY in its text format, and psql's tables."""
    from tests.support.postgres import PostgresServer

    with PostgresServer() as server:
        url = server.url.set(drivername="postgresql").render_as_string()

        def psql(*commands: str) -> str:
            arguments = [part for command in commands for part in ("-c", command)]
            return run("psql", "-qX", url, *arguments, PGTZ="UTC")

        psql(TABLE, inserts())
        psql(f"\\copy people to {FOLDER}/psql.csv csv header")
        psql(f"\\copy people to {FOLDER}/psql-forced.csv with (format csv, header, force_quote *)")
        psql(f"\\copy people to {FOLDER}/psql-null.csv with (format csv, header, null '\\N')")
        psql(f"\\copy people to {FOLDER}/psql-text.txt with (format text, header)")
        write(
            "psql-csv.csv",
            run("psql", "-qX", "--csv", url, "-c", "select email, full_name, is_active from people"),
        )
        query = "select email, full_name, is_active from people"
        write("psql-aligned.txt", psql(query))
        write("psql-unaligned.txt", run("psql", "-qXA", url, "-c", query + " where id < 7"))
        write("psql-agg.json", run("psql", "-qXAt", url, "-c", f"select json_agg(p) from ({query}) p"))
        write("psql-row.ndjson", run("psql", "-qXAt", url, "-c", f"select row_to_json(p) from ({query}) p"))
        write(
            "psql-berlin.csv",
            run("psql", "-qX", "--csv", url, "-c", "select * from people", PGTZ="Europe/Berlin"),
        )


def mariadb() -> None:
    """The mariadb client's --batch, and SELECT … INTO OUTFILE."""
    with tempfile.TemporaryDirectory(prefix="roster-mariadb-", dir="/tmp") as folder:
        data, socket = f"{folder}/data", f"{folder}/socket"
        Path(folder).chmod(0o755)
        run(
            "mariadb-install-db",
            "--no-defaults",
            f"--datadir={data}",
            "--user=root",
            "--auth-root-authentication-method=normal",
        )
        process = subprocess.Popen(
            [
                "mariadbd",
                "--no-defaults",
                f"--datadir={data}",
                f"--socket={socket}",
                "--skip-networking",
                "--user=root",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            client = [
                "mariadb",
                "--no-defaults",
                "--user=root",
                f"--socket={socket}",
                "--default-character-set=utf8mb4",
            ]
            run("mariadb-admin", "--no-defaults", "--user=root", f"--socket={socket}", "--wait=30", "ping")
            table = TABLE.replace("timestamptz", "datetime(6)")
            statement = inserts().replace("Z'", "'").replace("\\", "\\\\")
            run(*client, stdin=f"create database d character set utf8mb4; use d; {table}; {statement};")
            query = "select email, full_name, is_active from people"
            json = "json_object('email', email, 'full_name', full_name, 'is_active', is_active)"
            options = ["--batch", "--raw", "--skip-column-names", "-e"]
            write("mariadb-json.ndjson", run(*client, "d", *options, f"select {json} from people"))
            write("mariadb-batch.tsv", run(*client, "d", "--batch", "-e", query))
            write("mariadb-table.txt", run(*client, "d", "--table", "-e", query))
            union = f"select 'email', 'full_name', 'is_active' union all {query}"
            for name, options in {
                "outfile": "fields terminated by ',' optionally enclosed by '\"'",
                "outfile-standard": "fields terminated by ',' optionally enclosed by '\"' escaped by '\"'",
                "outfile-plain": "fields terminated by ',' optionally enclosed by '\"' escaped by ''",
            }.items():
                run(
                    *client,
                    "d",
                    "-e",
                    f"{union} into outfile '{folder}/{name}.csv' character set utf8mb4 {options}",
                )
                shutil.copyfile(f"{folder}/{name}.csv", FOLDER / f"mariadb-{name}.csv")
        finally:
            process.terminate()
            process.wait()


def r() -> None:
    """R's write.csv, write.csv2 and write.table."""
    program = f"""
people <- read.csv("{FOLDER}/pandas.csv", na.strings = "", colClasses = c("character", "character", "logical"))
people$is_active <- as.logical(people$is_active)
write.csv(people, "{FOLDER}/r.csv")
write.csv(people, "{FOLDER}/r-plain.csv", row.names = FALSE, na = "", quote = TRUE)
write.csv2(people, "{FOLDER}/r-csv2.csv", row.names = FALSE)
write.table(people, "{FOLDER}/r-table.txt", sep = "\\t")
"""
    run("Rscript", "--vanilla", "-e", program, LC_ALL="C.UTF-8")


def libreoffice() -> None:
    """LibreOffice Calc, which converts the workbook of pandas: comma, semicolon, tab in UTF-16, ods, xls."""
    with tempfile.TemporaryDirectory() as folder:
        workbook = shutil.copyfile(FOLDER / "pandas.xlsx", Path(folder) / "people.xlsx")
        filters = {
            "libreoffice.csv": "44,34,76",
            "libreoffice-quoted.csv": "44,34,76,1,,0,true",
            "libreoffice-semicolon.csv": "59,34,76",
            "libreoffice-cp1252.csv": "59,34,1",
            "libreoffice-utf16.txt": "9,34,65535",
        }
        for name, options in filters.items():
            conversion = f"csv:Text - txt - csv (StarCalc):{options}"
            run(
                "soffice",
                "--headless",
                f"-env:UserInstallation=file://{folder}/profile",
                "--convert-to",
                conversion,
                "--outdir",
                folder,
                workbook,
            )
            shutil.copyfile(Path(folder) / "people.csv", FOLDER / name)
        for ending in ("ods", "xls"):
            run(
                "soffice",
                "--headless",
                f"-env:UserInstallation=file://{folder}/profile",
                "--convert-to",
                ending,
                "--outdir",
                folder,
                workbook,
            )
            shutil.copyfile(Path(folder) / f"people.{ending}", FOLDER / f"libreoffice.{ending}")


def spark() -> None:
    """Spark's writers: part files of CSV, JSON and Parquet."""
    from pyspark.sql import SparkSession

    session = (
        SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.session.timeZone", "UTC")
        .getOrCreate()
    )
    rows = list(zip(map(Decimal, column("id")), *(column(name) for name in NAMES[1:]), strict=True))
    frame = session.createDataFrame(
        rows, "id decimal(20,0), email string, full_name string, is_active boolean, created_at timestamp"
    ).coalesce(1)
    with tempfile.TemporaryDirectory() as folder:
        frame.select(*SHORT).write.option("header", True).csv(f"{folder}/csv")
        frame.select(*SHORT).write.option("header", True).option("escape", '"').csv(f"{folder}/csv-standard")
        frame.write.json(f"{folder}/json")
        frame.write.json(f"{folder}/json-gzip", compression="gzip")
        frame.write.parquet(f"{folder}/parquet")
        frame.selectExpr(
            "encode(email, 'UTF-8') email", "encode(full_name, 'UTF-8') full_name", "is_active"
        ).write.parquet(f"{folder}/parquet-binary")
        session.conf.set("spark.sql.parquet.outputTimestampType", "TIMESTAMP_MICROS")
        frame.write.parquet(f"{folder}/parquet-micros")
        session.stop()
        for kind in sorted(Path(folder).iterdir()):
            [part] = kind.glob("part-*")
            shutil.copyfile(part, FOLDER / f"spark-{kind.name}.{part.name.partition('.')[2]}")


def django() -> None:
    """Django's dumpdata of auth.user, with its own password hashes."""
    import django
    from django.conf import settings

    settings.configure(
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"],
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        SECRET_KEY="x",
    )
    django.setup()
    from django.contrib.auth.models import User
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    for person in PEOPLE:
        first, _, last = (person["full_name"] or "").partition(" ")
        user = User.objects.create_user(
            person["email"].partition("@")[0],
            person["email"],
            f"secret-{person['id']}",
            first_name=first,
            last_name=last,
            is_active=person["is_active"],
        )
        user.save()
    call_command("dumpdata", "auth.user", output=str(FOLDER / "django-dumpdata.json"))
    call_command("dumpdata", "auth.user", format="jsonl", output=str(FOLDER / "django-dumpdata.jsonl"))


MAKERS: dict[str, Callable[[], None]] = {
    maker.__name__: maker
    for maker in (
        pandas,
        polars,
        duckdb,
        arrow,
        fastparquet,
        python,
        sqlite,
        jq,
        postgresql,
        mariadb,
        r,
        libreoffice,
        django,
        spark,
    )
}

if __name__ == "__main__":
    for name in sys.argv[1:] or MAKERS:
        print(name)
        MAKERS[name]()
