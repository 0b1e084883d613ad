"""A model of one named load in plain Python, with the responses to each stream; and random histories for it.

A history is plain data, so that one that fails can be saved as JSON. Its steps:

["open"]                    open a stream; the latest is number 0
["send", stream, messages]  send several messages, then read the responses
["lose", stream, messages]  send messages, leave without reading, and open another stream
["half-close", stream]      end a stream without completing the load
["abort"]                   abort the load

Its "accidents" are the faults of the commits of batches, in order. There are never two in a row, because a
message is retried:

"refuse"  the database refuses the commit
"forget"  nothing is committed, and the response is lost
"lose"    the response is lost
""        none

A message is [shift, rows, finish]: its offset relative to the watermark that the stream knew before the step,
or null for no offset; a letter for each row, which names a user, or "!" for an invalid row.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from google.rpc.code_pb2 import OUT_OF_RANGE
from hypothesis import strategies as st

from roster.v1.bulk_pb2 import BulkAck, BulkLoad, BulkOptions, BulkSummary, RowFailure

BAD_ROW = "!"
MASK = {"paths": ["full_name"]}
COUNTED = ("created", "updated", "skipped", "failed")

# Its offset, its rows, and whether it completes the load.
Message = tuple[int | None, str, bool]


class Ended(Exception):
    """A stream ends with a status; the argument is its reason."""


@dataclass(frozen=True)
class Row:
    """The outcome of one row."""

    what: str
    id: int = 0
    reason: str = ""  # of its failure; in a batch that fails as a whole only the invalid rows have one
    existing_id: int = 0


@dataclass
class Stream:
    """The state of one stream of a load."""

    epoch: int
    watermark: int
    has_finished: bool  # when it was opened
    end: int = 0  # after its last message


@dataclass
class LoadModel:
    """A load of users; those that it creates have the ids 1, 2, …"""

    options: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    users: dict[str, int] = field(default_factory=dict)
    state: BulkLoad.State.ValueType = BulkLoad.OPEN
    epoch: int = 0

    def open(self) -> Stream:
        """Open a stream; raises Ended."""
        if self.state == BulkLoad.ABORTED:
            raise Ended("LOAD_ABORTED")
        self.epoch += 1
        return Stream(self.epoch, len(self.rows), self.state == BulkLoad.FINISHED)

    def abort(self) -> None:
        """Abort the load if it is open."""
        if self.state == BulkLoad.OPEN:
            self.state = BulkLoad.ABORTED
            self.epoch += 1

    def send(self, stream: Stream, offset: int | None, names: str) -> BulkAck | None:
        """Return the ack of a message, None if it has none; raises Ended."""
        begin = stream.end if offset is None else offset
        stream.end = end = begin + len(names)
        if begin > stream.watermark:
            return _gap(begin, stream.watermark)
        new = names[max(stream.watermark - begin, 0) :]
        if new:
            self._write(stream, new)
        if not names:
            return None
        return self._ack(begin, self.rows[begin:end], stream.watermark, is_replayed=not new)

    def finish(self, stream: Stream) -> BulkSummary:
        """Complete the load and return its summary; raises Ended."""
        if not stream.has_finished:
            self._check(stream)
            self.state = BulkLoad.FINISHED
        return self.summary()

    def summary(self) -> BulkSummary:
        """Return the counts of the load."""
        counts = {what: sum(row.what == what for row in self.rows) for what in COUNTED}
        return BulkSummary(next_offset=len(self.rows), state=self.state, **counts)

    def failures(self) -> list[RowFailure]:
        """Return the failures of all rows."""
        return _failures(0, self.rows)

    def possible_states(self, stream: Stream, messages: Sequence[Message]) -> "list[LoadModel]":
        """Return the possible states of the load after messages whose acks were not read."""
        possible, after = [self], deepcopy(self)
        for offset, names, finish in messages:
            try:
                ack = after.send(stream, offset, names)
                possible.append(deepcopy(after))
                if finish and not (ack and ack.HasField("error")):
                    after.finish(stream)
                    return [*possible, after]
            except Ended:
                break
        return possible

    def _check(self, stream: Stream) -> None:
        if self.epoch != stream.epoch or self.state != BulkLoad.OPEN:
            raise Ended("LOAD_FENCED")

    def _write(self, stream: Stream, names: str) -> None:
        if stream.has_finished:
            raise Ended("LOAD_FINISHED")
        self._check(stream)
        before = dict(self.users)
        rows = [self._applied(name) for name in names]
        if self.options.get("atomicity") == BulkOptions.BATCH and any(row.reason for row in rows):
            known = before.values()
            rows = [
                replace(row, what="failed", id=0, existing_id=row.existing_id * (row.existing_id in known))
                for row in rows
            ]
            self.users = before
        self.rows += rows
        stream.watermark = len(self.rows)

    def _applied(self, name: str) -> Row:
        if name == BAD_ROW:
            return Row("failed", reason="INVALID_FIELD")
        id = self.users.get(name)
        if id is None:
            self.users[name] = id = len(self.users) + 1
            return Row("created", id)
        on_conflict = self.options.get("on_conflict", BulkOptions.FAIL)
        if on_conflict == BulkOptions.FAIL:
            return Row("failed", reason="EMAIL_TAKEN", existing_id=id)
        return Row("skipped" if on_conflict == BulkOptions.SKIP else "updated", id)

    @staticmethod
    def _ack(begin: int, rows: Sequence[Row], watermark: int, *, is_replayed: bool) -> BulkAck:
        counts = {what: sum(row.what == what for row in rows) for what in COUNTED}
        return BulkAck(
            offset=begin,
            next_offset=watermark,
            replayed=is_replayed,
            ids=[row.id for row in rows],
            failures=_failures(begin, rows),
            **counts,
        )


def place(stream: Stream, messages: Sequence[Message]) -> list[Message]:
    """Return messages with offsets instead of shifts."""
    return [
        (None if shift is None else max(stream.watermark + shift, 0), names, finish)
        for shift, names, finish in messages
    ]


def _failures(begin: int, rows: Sequence[Row]) -> list[RowFailure]:
    return [
        RowFailure(offset=begin + position, reason=row.reason, existing_id=row.existing_id)
        for position, row in enumerate(rows)
        if row.reason
    ]


def _gap(begin: int, watermark: int) -> BulkAck:
    ack = BulkAck(offset=begin, next_offset=watermark)
    ack.error.code = OUT_OF_RANGE
    return ack


SHIFTS = st.none() | st.sampled_from([0, 0, 0, -1, -2, -5, 1, 3])
ROWS = st.text(f"abcdef{BAD_ROW}", min_size=1, max_size=4)
MESSAGES = st.lists(st.tuples(SHIFTS, ROWS, st.just(False)), min_size=1, max_size=4)
LAST = st.tuples(SHIFTS, ROWS | st.just(""), st.just(True))
STREAMS = st.sampled_from([0, 0, 0, 1, 1, 2])
STEPS = st.one_of(
    *[st.tuples(st.just("send"), STREAMS, MESSAGES)] * 4,
    *[st.tuples(st.just("lose"), STREAMS, MESSAGES)] * 2,
    *[st.tuples(st.just("open"))] * 3,
    st.tuples(st.just("half-close"), STREAMS),
    st.tuples(st.sampled_from(["send", "lose"]), STREAMS, st.tuples(LAST)),
    st.tuples(st.just("abort")),
)
OPTIONS = st.sampled_from(
    [
        {},
        {"atomicity": BulkOptions.BATCH},
        {"on_conflict": BulkOptions.SKIP},
        {"on_conflict": BulkOptions.UPDATE, "update_mask": MASK},
    ]
)
ACCIDENTS = st.lists(st.sampled_from(["", "", "refuse", "forget", "lose"]), max_size=12).map(
    lambda some: [each for accident in some for each in (accident, "")]
)
HISTORIES = st.fixed_dictionaries(
    {"options": OPTIONS, "steps": st.lists(STEPS, min_size=4, max_size=14), "accidents": ACCIDENTS}
)
