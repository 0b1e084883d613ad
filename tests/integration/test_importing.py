"""The statements of docs/importing.md, run on PostgreSQL and SQLite with the tables that they name."""

import csv
import io
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import pytest
from google.protobuf.message import Message
from sqlalchemy import make_url

from roster.v1.resources_pb2 import User
from service.cli.formats import Csv
from tests.support.field import FOLDER, PEOPLE
from tests.support.files import columns_of, rows_of
from tests.support.postgres import Postgres

PAGE = (Path(__file__).parents[2] / "docs/importing.md").read_text()
PEOPLE_STATEMENT, SUPABASE_STATEMENT = re.findall(r"\\copy \((.*)\) to 'people\.csv' csv header", PAGE)
SQLITE_STATEMENT = re.findall(r"`sqlite3 -header -csv people\.db '(.*)' > people\.csv`", PAGE)[0]
PEOPLE_TABLE = "create table people (email text, full_name text, is_active boolean)"
ROWS = [(person["email"], person["full_name"], person["is_active"]) for person in PEOPLE]
USERS = [User(email=email, full_name=name, is_active=is_active) for email, name, is_active in ROWS]


async def export(
    postgres: Postgres, statements: Sequence[str], insert: str, rows: Sequence[tuple[object, ...]], query: str
) -> bytes:
    """Fill a table, and return what COPY writes for a query, as psql's copy does."""
    output = io.BytesIO()
    async with postgres.database() as url:
        connection = await asyncpg.connect(
            make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        )
        try:
            for statement in statements:
                await connection.execute(statement)
            await connection.executemany(insert, rows)
            await connection.copy_from_query(query, output=output, format="csv", header=True)
        finally:
            await connection.close()
    return output.getvalue()


def users_in(data: bytes) -> list[Message | None]:
    """Return the users of CSV."""
    return [row.message for row in rows_of(Csv(columns_of()), data)]


async def test_loads_what_psql_copies(postgres: Postgres) -> None:
    """The statement of the section on PostgreSQL."""
    data = await export(
        postgres, [PEOPLE_TABLE], "insert into people values ($1, $2, $3)", ROWS, PEOPLE_STATEMENT
    )

    assert users_in(data) == USERS


async def test_loads_the_users_of_supabase(postgres: Postgres) -> None:
    """The statement finds the names in the metadata, and those who are banned."""
    columns = "email text, encrypted_password text, raw_user_meta_data jsonb, banned_until timestamptz"
    with (FOLDER / "supabase.csv").open(newline="") as file:
        accounts = list(csv.DictReader(file))
    rows = [
        (row["email"], row["encrypted_password"], row["raw_user_meta_data"], row["banned_until"] or None)
        for row in accounts
    ]
    data = await export(
        postgres,
        ["create schema auth", f"create table auth.users ({columns})"],
        "insert into auth.users values ($1, $2, $3::text::jsonb, $4::text::timestamptz)",
        rows,
        SUPABASE_STATEMENT,
    )

    users = users_in(data)

    hashes = [row["encrypted_password"] for row in accounts]
    expected = [User() for _ in USERS]
    for copy, user, password_hash in zip(expected, USERS, hashes, strict=True):
        copy.CopyFrom(user)
        copy.hashed_password = password_hash
    assert users == expected


@pytest.mark.skipif(not shutil.which("sqlite3"), reason="the command sqlite3 is not installed")
def test_loads_what_sqlite_prints(tmp_path: Path) -> None:
    """The command of the section on SQLite."""
    file = tmp_path / "people.db"
    subprocess.run(["sqlite3", file, PEOPLE_TABLE], check=True)
    with sqlite3.connect(file) as connection:
        connection.executemany("insert into people values (?, ?, ?)", ROWS)
    connection.close()

    done = subprocess.run(
        ["sqlite3", "-header", "-csv", file, SQLITE_STATEMENT], check=True, capture_output=True
    )

    assert users_in(done.stdout) == USERS
