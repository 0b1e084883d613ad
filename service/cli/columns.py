"""The columns of a file: which field each one is, and the message that a row becomes."""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import click
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from roster.errors import InvalidField, TooLarge
from service.cli.rows import Entity, SourceError
from service.cli.values import PARSERS, text, timestamp
from service.escape import escape

# The server accepts rows with up to 1 MiB of content.
MAX_ROW_BYTES = 2 << 20
MAX_LAYOUTS = 1000
MAX_IGNORED_NAMES = 100
MAX_SHOWN_NAMES, MAX_SHOWN_CHARACTERS = 10, 24  # a row in place of a header may contain a hash
MAX_NAME = 100  # characters; longer names are data
MAX_LAYOUT = 1000  # characters
ERROR = "_error"

TIMESTAMP = Timestamp.DESCRIPTOR
EMPTY = ("", b"")
NEAR = 0.8  # the ratio of SequenceMatcher from which a name is taken for a misspelt one
MIN_WORD = 4
WORD = re.compile(r"[A-Z]?[^\W_A-Z]+|[A-Z]+(?![^\W_A-Z])")
SEPARATORS = re.compile(r"[\W_]+")
# Whether a row is active, in other words. Only `enabled` means the same.
STATUS = re.compile(
    r"(?:is|account|user)?(?:(?:disabled|blocked|suspended|banned|locked|lockedout|deactivated|archived|deleted)"
    r"(?:at|on|until|date)?|inactive|notactive|status|(enabled))"
)


class UnknownColumn(InvalidField):
    """A column that is not known, but whose name is near that of a known one."""


class Columns:
    """Maps the columns of a file to the fields of an entity.

    Names match in any case, in snake_case, camelCase or with spaces. `mapping` maps fields to columns with
    other names. `ignored` collects the names of columns that are not read, and `found` the fields that the
    file has so far: those of the header, or of any row.
    """

    def __init__(
        self,
        entity: Entity,
        names: Sequence[str],
        mapping: Mapping[str, str] | None = None,
        ignore: Collection[str] = (),
    ) -> None:
        self.names = names
        self.mapping = mapping or {}
        self.ignored: dict[str, None] = {}
        self.found: set[str] = set()
        self.entity = entity
        descriptor = entity.message.DESCRIPTOR
        descriptors = descriptor.fields_by_name
        self._parsers = {name: PARSERS[descriptors[name].type] for name in names}
        self.times = {name for name in names if self._parsers[name] is timestamp}
        self._layouts: dict[tuple[str, ...], list[str | None]] = {}  # the fields of rows with these names
        self._fields: dict[str, str | None] = dict.fromkeys(ignore) | {ERROR: None}
        self._fields |= {column: field for field, column in self.mapping.items()}
        self._by_spelling = {_spelling(name): name for name in names if name not in self.mapping}
        exported = [field.name for field in descriptor.fields if field.message_type in (None, TIMESTAMP)]
        self._unread = set(map(_spelling, exported)) - {*self._by_spelling}

    def count_known(self, names: Iterable[str]) -> int:
        """Return how many of the names are those of fields."""
        return sum(self._match(name) is not None for name in names)

    def check(self, names: Sequence[str], place: str, advice: str = "") -> list[str | None]:
        """Return the fields of the columns of a file; raises SourceError.

        `place` is what has the names, such as "the header line"; `advice` is for the case that none is known.
        """
        shown = ", ".join(_shorten(name) for name in names[:MAX_SHOWN_NAMES])
        for field, column in self.mapping.items():
            meant = [name for name in names if _spelling(name) == _spelling(column)]
            if not meant:
                raise SourceError(f"--columns names {escape(column)}, but {place} has {shown}")
            if column not in meant:
                self._fields[meant[0]] = field
        try:
            fields = self.fields_of(names)
        except InvalidField as error:
            raise SourceError(error.message) from None
        if not any(fields):
            known = ", ".join(name for name in self.names if name not in self.entity.refused)
            advice = advice or f"name the columns with --columns, such as --columns {self.names[0]}=NAME"
            raise SourceError(
                f"{place} has none of the columns {known}; it has {shown or 'no names'}; {advice}"
            )
        return fields

    def fields_of(self, names: Sequence[str]) -> list[str | None]:
        """Return the fields of all columns of a row; raises UnknownColumn, InvalidField."""
        fields = [self._match(name) for name in names]
        unknown = [name for name, field in zip(names, fields, strict=True) if field is None]
        self._refuse_near(unknown, fields)
        first_names: dict[str, str] = {}
        for name, field in zip(names, fields, strict=True):
            if field is not None and field in first_names:
                raise InvalidField(_both(field, first_names[field], name), field=field)
            if field is not None:
                first_names[field] = name
        self._refuse_alternatives(first_names)
        self.found.update(first_names)
        return fields

    def _refuse_alternatives(self, names: Mapping[str, str]) -> None:
        """Raise InvalidField if there are several columns of which a row needs only one, by field."""
        alternatives = [field for field in self.entity.alternatives if field in names]
        if len(alternatives) > 1:
            found = " and ".join(alternatives)
            ignore = " or ".join(f"--ignore {shlex.quote(names[field])}" for field in alternatives)
            raise InvalidField(
                f"there are columns for {found}, and either identifies a row; add {ignore}",
                field=alternatives[0],
            )

    def to_message(self, row: Mapping[str, Any]) -> Message:
        """Return the message of a row by column; raises InvalidField, UnknownColumn, TooLarge."""
        names = tuple(row)
        fields = self._layouts.get(names)
        if fields is None:
            fields = self.fields_of(names)
            if len(self._layouts) < MAX_LAYOUTS and sum(map(len, names)) <= MAX_LAYOUT:
                self._layouts[names] = fields
        return self.message_of(fields, row.values())

    def message_of(self, fields: Iterable[str | None], values: Iterable[Any]) -> Message:
        """Return the message of a row; raises InvalidField, TooLarge.

        `fields` are those of the values, None for ignored columns; further values are ignored too. NaN is
        unset, and so is an empty value, unless the field is a string.
        """
        parsed = {}
        for field, value in zip(fields, values, strict=False):
            if field is None or value is None or value != value:  # noqa: PLR0124 - only NaN differs from itself
                continue
            parser = self._parsers[field]
            if parser is text or value not in EMPTY:
                parsed[field] = parser(field, value)
        message = self.entity.message(**parsed)
        if message.ByteSize() > MAX_ROW_BYTES:
            raise TooLarge(f"the row is larger than {MAX_ROW_BYTES >> 20} MiB")
        return message

    def _match(self, name: str) -> str | None:
        if name in self._fields:
            return self._fields[name]
        return self._by_spelling.get(_spelling(name))

    def _refuse_near(self, unknown: Iterable[str], present: Collection[str | None]) -> None:
        """Raise UnknownColumn if names could be meant for fields, otherwise remember them as ignored.

        All of them are reported at once, so that nobody has to run a command for each.
        """
        near: dict[str, list[str]] = {}
        for name in unknown:
            if name in self._fields or name in self.ignored or not name.strip() or len(name) > MAX_NAME:
                continue
            if field := self._near_field(name, present):
                near.setdefault(field, []).append(name)
        if near:
            sentences = [self._advise(field, names) for field, names in near.items()]
            raise UnknownColumn("the " + ". The ".join(sentences), field=next(iter(near)))
        for name in unknown:
            if name.strip() and name not in self._fields and len(self.ignored) < MAX_IGNORED_NAMES:
                self.ignored[name[:MAX_NAME]] = None

    def _near_field(self, name: str, present: Collection[str | None]) -> str | None:
        """Return the field for which a name could be meant."""
        if _spelling(name) in self._unread:  # a field that this operation does not read
            return None
        status = self.entity.status
        is_status = STATUS.fullmatch(_spelling(name)) and any(present)
        if is_status and status in self.names and status not in present:
            return status
        for field in self.names:
            # A column such as email_verified, next to email, is not a misspelt one.
            if _is_misspelt(name, field) or (field not in present and _shares_word(name, field)):
                return field
        return None

    def _advise(self, field: str, names: Sequence[str]) -> str:
        """Return what to do about columns that could be meant for a field, after `the`."""
        names = names[:MAX_SHOWN_NAMES]
        shown = " and ".join(f'"{_shorten(name)}"' for name in names)
        ignore = " ".join(f"--ignore {shlex.quote(name)}" for name in names)
        if len(names) > 1:
            return (
                f"columns {shown} are not known. If one of them is {field}, name it with --columns; if "
                f"{field} is made of them, join them in one column; if not, add {ignore}"
            )
        status = STATUS.fullmatch(_spelling(names[0]))
        condition, advice = f"it is {field}", f"add --columns {shlex.quote(f'{field}={names[0]}')}"
        if status and field == self.entity.status:
            # Without the column, rows that were disabled elsewhere would be active.
            condition = f"it says which {self.entity.name} are active"
            advice = advice if status[1] else f"write {field} instead, as true or false"
        return f"column {shown} is not known. If {condition}, {advice}; if not, add {ignore}"


def parse_columns(options: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the columns of `--columns field=Column,…` by field; raises UsageError."""
    mapping: dict[str, str] = {}
    for option in options:
        lexer = shlex.shlex(option, posix=True)
        lexer.whitespace, lexer.whitespace_split = ",", True
        lexer.quotes, lexer.escape, lexer.commenters = '"', "", ""
        try:
            pairs = list(lexer)
        except ValueError:
            raise click.UsageError(f"--columns {option}: a quote is not closed") from None
        for pair in pairs:
            field, separator, column = pair.partition("=")
            field = field.strip()
            if not (separator and column):
                raise click.UsageError(f"--columns {pair}: write FIELD=COLUMN, such as email=Mail")
            if field not in names:
                raise click.UsageError(f"--columns {pair}: {field} is not one of {', '.join(names)}")
            if field in mapping:
                raise click.UsageError(f"--columns gives {field} twice")
            if column in mapping.values():
                raise click.UsageError(f"--columns gives the column {column} twice")
            mapping[field] = column
    return mapping


def _spelling(name: str) -> str:
    """Return what full_name, fullName and "Full Name" have in common."""
    return SEPARATORS.sub("", name).casefold()


def _is_misspelt(name: str, field: str) -> bool:
    return SequenceMatcher(None, _spelling(name), _spelling(field)).ratio() >= NEAR


def _shares_word(name: str, field: str) -> bool:
    """Return whether names share a word, as passwordHash and hashed_password do, or one has the other."""
    words = {word.casefold() for word in WORD.findall(name) if len(word) >= MIN_WORD}
    spelling, known = _spelling(name), _spelling(field)
    is_part = min(len(spelling), len(known)) >= MIN_WORD and (spelling in known or known in spelling)
    return is_part or not words.isdisjoint(field.split("_"))


def _both(field: str, first: str, second: str) -> str:
    """Return why two columns of one field are refused."""
    if first == second:
        return f"two columns are named {_quote(first)}; remove or rename one of them"
    return (
        f"the columns {_quote(first)} and {_quote(second)} are both {field}; "
        f"choose one with --columns {field}={shlex.quote(first)} --ignore {shlex.quote(second)}"
    )


def _shorten(name: str) -> str:
    return escape(name[:MAX_SHOWN_CHARACTERS])


def _quote(name: str) -> str:
    return f'"{_shorten(name)}"'
