"""The difference between a file and the users that match, computed on disk by a private SQLite database.

Its file has no name: the operating system removes it with the process, however that ends. SQLite sorts with
an external merge sort, so memory does not grow with the number of rows.
"""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from tempfile import gettempdir
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Row,
    Select,
    String,
    Table,
    case,
    create_engine,
    delete,
    exists,
    false,
    func,
    insert,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import StaticPool
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable

from service.cli.mirror.values import FileRow, StoredUser

MEMORY_KIB = 64 << 10  # of the page cache, and as much again for a sort
# Nothing protects the data from a crash, because a crash removes it.
PRAGMAS = ("temp_store = FILE", "journal_mode = OFF", "synchronous = OFF", f"cache_size = -{MEMORY_KIB}")
DISK_ERRORS = (sqlite3.OperationalError, OperationalError)
READ_ROWS = 1000
EMAIL_MISSING = "email is required"


class Counts(NamedTuple):
    """How many rows the file has, how many users match, and what would happen to them.

    `removable` is how many of the matching users could be among the deletes.
    """

    rows: int
    matching: int
    removable: int
    deletes: int
    updates: int
    creates: int

    @property
    def unchanged(self) -> int:
        return self.rows - self.updates - self.creates


class Difference:
    """Compares the rows of a file with users by a key, `email` or `id`.

    Add all rows and users, call `sort`, then `compare`. The lists `deletes`, `updates` and `creates` contain
    the values to write, by position from 1. `parks` lists users whose e-mail another user gets before they
    get their own new one. Raises DISK_ERRORS if the disk is full.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._driver = _open(gettempdir())
        engine = create_engine("sqlite://", creator=lambda: self._driver, poolclass=StaticPool)
        self._connection: Connection = engine.connect()
        # Without a transaction, each row would be one, which takes 100 µs.
        self._driver.execute("BEGIN")
        tables = MetaData()
        self._unsorted_rows = Table("unsorted_rows", tables, *_row_columns())
        self._unsorted_users = Table("unsorted_users", tables, *_user_columns())
        self._rows = _sorted_table("file_rows", tables, _row_columns(), [key, "number"])
        self._users = _sorted_table("matching_users", tables, _user_columns(), dict.fromkeys([key, "id"]))
        self.deletes = _list("deletes", tables, "id", "version", "email")
        self.parks = _list("parks", tables, "id", "version")
        self.updates = _list("updates", tables, "version", "previous_email", *FileRow._fields)
        self.creates = _list("creates", tables, *FileRow._fields)
        self._indexes = [
            Index("users_by_email", self._users.c.email),
            Index("updates_by_previous_email", self.updates.c.previous_email),
        ]
        for table in tables.sorted_tables:
            self._connection.execute(CreateTable(table))

    def close(self) -> None:
        """Delete everything."""
        self._connection.close()
        self._driver.close()

    def interrupt(self) -> None:
        """Stop the statement that runs in another thread."""
        self._driver.interrupt()

    def add_rows(self, rows: Sequence[FileRow]) -> None:
        """Add rows of the file."""
        self._add(self._unsorted_rows, rows)

    def add_users(self, users: Sequence[StoredUser]) -> None:
        """Add users that match."""
        self._add(self._unsorted_users, users)

    def _add(self, table: Table, values: Sequence[tuple[Any, ...]]) -> None:
        self._driver.executemany(str(insert(table).compile(self._connection)), values)

    def sort(self) -> None:
        """Sort both sides by the key."""
        for unsorted, table in ((self._unsorted_rows, self._rows), (self._unsorted_users, self._users)):
            in_order = select(unsorted).order_by(*(unsorted.c[column.name] for column in table.primary_key))
            self._connection.execute(insert(table).from_select([column.name for column in table.c], in_order))
            self._connection.execute(DropTable(unsorted))

    def repeated(self, column: str, limit: int) -> list[list[int]]:
        """Return the line numbers of rows that have the same value in a column, at most `limit` groups."""
        value, number = self._rows.c[column], self._rows.c.number
        groups = (
            select(func.min(number), func.max(number))
            .where(value.is_not(None))
            .group_by(value)
            .having(func.count() > 1)
            .limit(limit)
        )
        return [list(row) for row in self._connection.execute(groups)]

    def ambiguous(self, limit: int) -> list[list[int]]:
        """Return the ids of users who have one e-mail in two forms, and a row in the file."""
        value, id = self._users.c[self.key], self._users.c.id
        groups = (
            select(func.min(id), func.max(id))
            .where(exists().where(self._rows.c[self.key] == value))
            .group_by(value)
            .having(func.count() > 1)
            .limit(limit)
        )
        return [list(row) for row in self._connection.execute(groups)]

    def compare(self, columns: Sequence[str], *, keeps_inactive: bool = False) -> Counts:
        """Write the lists, and return the counts. `columns` are those that are compared.

        With `keeps_inactive`, users who are not active are not among the deletes.
        """
        rows, users = self._rows, self._users
        same = rows.c[self.key] == users.c[self.key]
        is_removable = users.c.is_active if keeps_inactive else true()
        deletes = select(users.c.id, users.c.version, users.c.email).where(
            is_removable, ~exists().where(same)
        )
        self._fill(self.deletes, deletes.order_by(users.c.id))
        creates = select(*self._created()).where(~exists().where(same))
        self._fill(self.creates, creates.order_by(rows.c.number))
        differs = or_(false(), *(rows.c[name].is_distinct_from(users.c[name]) for name in columns))
        updates = select(*self._updated(columns)).join_from(rows, users, same).where(differs)
        self._fill(self.updates, updates.order_by(users.c.id))
        if self.key == "id":
            for index in self._indexes:
                self._connection.execute(CreateIndex(index))
        if "email" in columns:
            self._fill(self.parks, self._later_owners())
        removable = self._count(users, is_removable)
        sizes = [self._count(table) for table in (self.deletes, self.updates, self.creates)]
        return Counts(self._count(rows), self._count(users), removable, *sizes)

    def _created(self) -> Iterator[ColumnElement[Any]]:
        rows = self._rows.c
        for name in FileRow._fields:
            value: ColumnElement[Any] = rows[name]
            if name == "problem":
                value = func.coalesce(rows.problem, rows.create_problem)
            yield value.label(name)

    def _updated(self, columns: Sequence[str]) -> Iterator[ColumnElement[Any]]:
        """Yield the values of an updated user; those in columns that are not compared stay the same."""
        rows, users = self._rows.c, self._users.c
        yield users.version
        yield users.email.label("previous_email")
        for name in FileRow._fields:
            value: ColumnElement[Any] = rows[name]
            if name in StoredUser._fields and name not in columns:
                value = users[name]
            elif name == "problem" and "email" in columns:
                value = case((rows.email.is_(None), EMAIL_MISSING), else_=rows.problem)
            yield value.label(name)

    def _later_owners(self) -> Select[Any]:
        """Return the users who get a new e-mail after another user has got their present one."""
        user, owner = self.updates.alias(), self.updates.alias()
        return (
            select(owner.c.id, owner.c.version)
            .join_from(user, owner, owner.c.previous_email == user.c.email)
            .where(owner.c.id > user.c.id, owner.c.email != owner.c.previous_email)
            .order_by(owner.c.id)
        )

    def _fill(self, table: Table, values: Select[Any]) -> None:
        names = [column.name for column in table.c if column.name != "position"]
        self._connection.execute(insert(table).from_select(names, values, include_defaults=False))

    def _count(self, table: Table, *conditions: ColumnElement[bool]) -> int:
        return self._connection.scalar(select(func.count()).select_from(table).where(*conditions)) or 0

    def is_empty(self, table: Table) -> bool:
        """Return whether a list has no rows."""
        return not self._connection.scalar(select(exists().select_from(table)))

    def unusable(self, limit: int) -> list[tuple[int, str]]:
        """Return the line numbers of rows that can't be written, and the reasons."""
        found: list[tuple[int, str]] = []
        for table in (self.updates, self.creates):
            problems = select(table.c.number, table.c.problem).where(table.c.problem.is_not(None))
            result = self._connection.execute(problems.limit(limit - len(found)))
            found += [(number, problem) for number, problem in result]
        return found

    def outside(self, conditions: Mapping[Table, ColumnElement[bool]], limit: int) -> list[int]:
        """Return the line numbers of rows for which the condition on their list is not true."""
        found: list[int] = []
        for table, condition in conditions.items():
            others = select(table.c.number).where(condition.is_not(True)).order_by(table.c.number)
            found += self._connection.scalars(others.limit(limit - len(found)))
        return found

    def kept_emails(self, limit: int) -> list[int]:
        """Return the line numbers of rows with the e-mail of a user who is not in the file."""
        found: list[int] = []
        rows, users = self._rows, self._users
        in_file = exists().where(rows.c[self.key] == users.c[self.key])
        for table in (self.updates, self.creates):
            owned = select(table.c.number).join_from(table, users, users.c.email == table.c.email)
            result = self._connection.scalars(owned.where(~in_file).limit(limit - len(found)))
            found += result
        return found

    def has_email(self, email: str) -> bool:
        """Return whether one of the users that match has a normalised e-mail."""
        found = self._connection.scalar(select(exists().where(self._users.c.email == email)))
        return bool(found)

    def read(self, table: Table, start: int = 0) -> Iterator[Row[Any]]:
        """Yield the rows of a list from an offset on."""
        while True:
            rows = self._connection.execute(
                select(table).where(table.c.position > start).order_by(table.c.position).limit(READ_ROWS)
            ).all()
            yield from rows
            if not rows:
                return
            start = rows[-1].position

    def row(self, table: Table, offset: int) -> Row[Any]:
        """Return one row of a list."""
        return self._connection.execute(select(table).where(table.c.position == offset + 1)).one()

    def remove_park(self, offset: int) -> None:
        """Forget a user who could not be parked, so that the update fails as well."""
        self._connection.execute(delete(self.parks).where(self.parks.c.position == offset + 1))

    def count_parks(self) -> None:
        """Let the updates expect the versions that parking has made."""
        parked = self.updates.c.id.in_(select(self.parks.c.id))
        self._connection.execute(
            update(self.updates).where(parked).values(version=self.updates.c.version + 1)
        )


def _open(folder: str) -> sqlite3.Connection:
    """Open a database in an unnamed file of a folder."""
    connection = sqlite3.connect("", check_same_thread=False, isolation_level=None)
    quoted = folder.replace("'", "''")
    # By itself, SQLite prefers /var/tmp to /tmp.
    for pragma in (f"temp_store_directory = '{quoted}'", *PRAGMAS):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _row_columns() -> list[Column[Any]]:
    return [_column(name) for name in FileRow._fields]


def _user_columns() -> list[Column[Any]]:
    return [_column(name) for name in StoredUser._fields]


def _column(name: str) -> Column[Any]:
    kinds: Mapping[str, Any] = {
        "position": Integer,
        "number": BigInteger,
        "id": BigInteger,
        "version": BigInteger,
        "is_active": Boolean,
    }
    return Column(name, kinds.get(name, String))


def _list(name: str, tables: MetaData, *columns: str) -> Table:
    position = Column("position", Integer, primary_key=True)
    return Table(name, tables, position, *map(_column, columns))


def _sorted_table(name: str, tables: MetaData, columns: list[Column[Any]], key: Any) -> Table:
    return Table(name, tables, *columns, PrimaryKeyConstraint(*key), sqlite_with_rowid=False)
