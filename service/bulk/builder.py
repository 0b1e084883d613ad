"""BatchBuilder: rows of a bulk stream -> the columns of a batch."""

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

from roster.errors import InvalidField
from service.db.bulk.batch import Batch
from service.timeslice import TimeSlice, map_in_slices
from service.validation import ID_RULE, VERSION_RULE, Rule
from service.wire import datetime_from_timestamp, timestamp_error

# Values of a column that are checked together. One invalid value has all of them checked one by one.
VALUES_AT_ONCE = 500


class BatchBuilder:
    """Builds a batch from messages, one column after the other. A row that breaks a rule is in `failures`.

    Rules are applied to many values at once, and to single ones only where that finds something. A value
    may take up to 1 ms, such as an e-mail with many labels in the form `xn--…`.
    """

    def __init__(self, messages: Sequence[Any]) -> None:
        self.batch = Batch(len(messages))
        self.messages = messages
        self._time_slice = TimeSlice()

    def values(self, field: str) -> list[Any]:
        """Return the values of a field."""
        return list(map(attrgetter(field), self.messages))

    def values_or_none(self, field: str) -> list[Any]:
        """Return the values of a field, with None in place of "" and 0."""
        values = self.values(field)
        return values if all(values) else [value or None for value in values]

    def set_values(self, field: str, default: bool | None = None) -> list[Any]:
        """Return the values of a field, and the default for messages in which it is unset."""
        values = self.values(field)
        if all(values):
            return values
        # HasField is needed only for a value that reads as its default.
        return [
            value if value or message.HasField(field) else default
            for value, message in zip(values, self.messages, strict=True)
        ]

    async def add(
        self,
        name: str,
        values: list[Any],
        rule: Rule,
        *,
        is_required: bool = False,
        normalise: Callable[[Any], Any] | None = None,
    ) -> None:
        """Add a column, and fail the rows that break its rule; None stands for an unset value.

        `normalise` returns the form of a value to store. Values that the rule accepts together have it.
        """
        self.batch.columns[name] = values
        for start in range(0, self.batch.size, VALUES_AT_ONCE):
            some = values[start : start + VALUES_AT_ONCE]
            is_missing = is_required and None in some
            if is_missing or not rule.accepts_all(some):
                for row in range(start, start + len(some)):
                    if normalise and values[row] is not None:
                        values[row] = normalise(values[row])
                    self._check(name, row, values[row], rule, is_required=is_required)
                    if self._time_slice.is_over:
                        await self._time_slice.pause()
            await self._time_slice.pause()

    def _check(self, name: str, row: int, value: Any, rule: Rule, *, is_required: bool) -> None:
        error = None
        if value is not None:
            error = rule.error(value)
        elif is_required:
            error = "is required where update_mask names it"
        if error:
            self.batch.fail(row, InvalidField(f"{name} {error}", field=name))

    async def add_fields(self, fields: Collection[str], rules: Mapping[str, Rule]) -> None:
        """Add a column for each of the fields that has a rule."""
        for name, rule in rules.items():
            if name in fields:
                await self.add(name, self.values(name), rule)

    async def add_identity(self, fields: Collection[str]) -> None:
        """Add the columns that every entity has: id and version, for restored rows the times too."""
        # A restored row has its times, and may have its id and version.
        if "created_at" in fields:
            await self.add("id", self.values_or_none("id"), ID_RULE)
            await self.add("version", [version or 1 for version in self.values("version")], VERSION_RULE)
            for name in ("created_at", "updated_at"):
                await self._add_times(name)
        # An update names its row by id; a version of 0 matches any.
        elif "id" in fields:
            await self.add("id", self.values("id"), ID_RULE)
            await self.add("version", self.values("version"), VERSION_RULE)

    async def _add_times(self, name: str) -> None:
        moments: list[Any] = [
            getattr(message, name) if message.HasField(name) else None for message in self.messages
        ]
        await self.add(name, moments, Rule(timestamp_error))
        failures = self.batch.failures
        rows = [row for row, moment in enumerate(moments) if moment is not None and row not in failures]
        times = await map_in_slices(lambda row: datetime_from_timestamp(moments[row]), rows)
        column: list[Any] = [None] * self.batch.size
        for row, time in zip(rows, times, strict=True):
            column[row] = time
        self.batch.columns[name] = column
