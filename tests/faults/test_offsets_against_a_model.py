"""Random histories of a load: each stream gets the responses of the model."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import grpc
import pytest
from google.rpc.status_pb2 import Status
from hypothesis import HealthCheck, given, seed, settings
from sqlalchemy.ext.asyncio import AsyncSession

from roster.errors import DatabaseUnavailable, OutcomeUnknown
from roster.v1.bulk_pb2 import (
    AbortBulkLoadRequest,
    BulkAck,
    BulkLoad,
    GetBulkLoadRequest,
    ListBulkLoadFailuresRequest,
)
from roster.v1.bulk_pb2_grpc import BulkServiceStub
from roster.v1.resources_pb2 import User
from roster.v1.users_pb2 import ListUsersRequest
from roster.v1.users_pb2_grpc import UserServiceStub
from service.db import engine
from service.db.bulk.batch import Outcome
from service.loads.model import Load
from service.loads.repository import LoadRepository
from tests.faults.histories import SEED, save_if_failed, saved_histories
from tests.support.errors import refusal
from tests.support.load_model import BAD_ROW, HISTORIES, Ended, LoadModel, Message, Stream, place
from tests.support.load_stream import LoadStream
from tests.support.server import serve

# More examples find rarer histories: ROSTER_TEST_EXAMPLES=2000 takes some minutes.
EXAMPLES = int(os.environ.get("ROSTER_TEST_EXAMPLES", "30"))
numbers = count()


@pytest.fixture
async def channel(database_url: str) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of the test."""
    # Abandoned streams stay open for a moment.
    async with (
        serve(database_url, caller_streams=1000) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield channel


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The faults of the next commits of batches."""
    planned: list[str] = []
    commit, record = engine._commit, LoadRepository.record

    async def recorded(loads: LoadRepository, load: Load, offset: int, outcome: Outcome) -> None:
        await record(loads, load, offset, outcome)
        loads.session.info["fault"] = planned.pop(0) if planned else ""

    async def commit_with_fault(session: AsyncSession) -> None:
        fault = session.info.get("fault")
        if fault == "refuse":
            raise DatabaseUnavailable("the database has refused a commit, for a test")
        if fault != "forget":
            await commit(session)
        if fault:
            raise OutcomeUnknown("the answer to a commit was lost, for a test")

    monkeypatch.setattr(LoadRepository, "record", recorded)
    monkeypatch.setattr(engine, "_commit", commit_with_fault)
    monkeypatch.setattr("service.bulk.committer.FIRST_PAUSE_SECONDS", 0)
    return planned


class Play:
    """Runs a history on the server and in the model."""

    def __init__(self, channel: grpc.aio.Channel, options: dict[str, Any]) -> None:
        self.users, self.loads = UserServiceStub(channel), BulkServiceStub(channel)
        self.number = next(numbers)  # a load of its own, with users of its own
        self.load_id = f"load{self.number}"
        self.options = options
        self.model = LoadModel(options)
        self.streams: list[tuple[LoadStream, Stream]] = []  # the newest first
        self.ids: dict[int, int] = {}  # what the model calls them

    async def step(self, kind: str, number: int = 0, messages: Sequence[Message] = ()) -> None:
        """Run one step of a history."""
        if kind == "open":
            await self._open()
        elif kind == "abort":
            await self.loads.AbortBulkLoad(AbortBulkLoadRequest(load_id=self.load_id))
            self.model.abort()
        elif self.streams:
            number = min(number, len(self.streams) - 1)
            stream, known = self.streams[number]
            if kind == "half-close":
                assert await stream.half_closed() == self.model.summary()
                del self.streams[number]
                return
            sent = place(known, messages)
            await self._write(stream, sent)
            if kind == "lose":
                del self.streams[number]
                await self._lose(stream, known, sent)
            elif not await self._answered(stream, known, sent):
                del self.streams[number]

    async def end(self) -> None:
        """Compare the final state of the load, with the outcome of each row."""
        if self.model.state != BulkLoad.ABORTED:
            await self._open()
            size = len(self.model.rows)  # where rows are sent again matters, and not what they are
            cut = size // 2
            await self.step("send", 0, [(-size, BAD_ROW * cut, False), (None, BAD_ROW * (size - cut), False)])
        request = ListBulkLoadFailuresRequest(load_id=self.load_id, page_size=1000)
        listed = BulkAck(failures=(await self.loads.ListBulkLoadFailures(request)).failures)
        expected = BulkAck(failures=self.model.failures())
        assert self._in_model(listed, expected) == expected
        assert await self._stored() == sorted(self.model.users)

    async def _open(self) -> None:
        opening = LoadStream.open(self.users, self.load_id, **self.options)
        try:
            known = self.model.open()
        except Ended as ended:
            await _refused(opening, ended)
            return
        stream = await opening
        assert stream.opened.next_offset == known.watermark
        self.streams.insert(0, (stream, known))

    async def _answered(self, stream: LoadStream, known: Stream, sent: Sequence[Message]) -> bool:
        """Compare the responses to messages, and return whether the stream is still open."""
        try:
            for offset, names, finish in sent:
                expected = self.model.send(known, offset, names)
                if expected:
                    ack = (await stream.answer()).ack
                    assert self._in_model(ack, expected) == expected
                if finish and not (expected and expected.HasField("error")):
                    summary = self.model.finish(known)
                    assert await stream.summary() == summary
                    return False
        except Ended as ended:
            await _refused(stream.answer(), ended)
            return False
        return True

    async def _lose(self, stream: LoadStream, known: Stream, sent: Sequence[Message]) -> None:
        """Leave without reading, and learn the result from the next stream."""
        stream.call.cancel()
        opening = LoadStream.open(self.users, self.load_id, **self.options)
        if self.model.state == BulkLoad.ABORTED:
            assert (await refusal(opening)).reason == "LOAD_ABORTED"
            return
        newer = await opening
        load = await self.loads.GetBulkLoad(GetBulkLoadRequest(load_id=self.load_id))
        found = (newer.opened.next_offset, load.state)
        possible = {
            (len(model.rows), model.state): model for model in self.model.possible_states(known, sent)
        }
        self.model = possible[found]
        self.streams.insert(0, (newer, self.model.open()))

    async def _write(self, stream: LoadStream, sent: Sequence[Message]) -> None:
        with suppress(grpc.RpcError, asyncio.InvalidStateError):  # it ended under them
            for offset, names, finish in sent:
                await stream.write(offset=offset, users=[self._row(name) for name in names], finish=finish)

    def _row(self, name: str) -> User:
        return User(
            email=f"{name}-{self.number}@example.org" if name != BAD_ROW else "nobody", full_name=name
        )

    def _in_model(self, ack: BulkAck, expected: BulkAck) -> BulkAck:
        """Return an ack as the model has it: with the model's ids, without codes and messages."""
        self._learn(zip(ack.ids, expected.ids, strict=True))
        pairs = zip(ack.failures, expected.failures, strict=True)
        self._learn((failure.existing_id, model.existing_id) for failure, model in pairs)
        received = BulkAck()
        received.CopyFrom(ack)
        received.ids[:] = [self.ids.get(id, 0) for id in ack.ids]
        del received.failures[:]
        for failure in ack.failures:
            existing_id = self.ids.get(failure.existing_id, 0)
            received.failures.add(offset=failure.offset, reason=failure.reason, existing_id=existing_id)
        if ack.HasField("error"):
            received.error.CopyFrom(Status(code=ack.error.code))
        return received

    def _learn(self, pairs: Iterable[tuple[int, int]]) -> None:
        for real, id in pairs:
            if real and id:
                self.ids.setdefault(real, id)
        assert len(set(self.ids.values())) == len(self.ids)

    async def _stored(self) -> list[str]:
        request = ListUsersRequest(filter=f'email : "-{self.number}@"', page_size=1000)
        return sorted(user.email.partition("-")[0] for user in (await self.users.ListUsers(request)).users)


async def _refused(call: Awaitable[Any], ended: Ended) -> None:
    refused = await refusal(call)
    # A write that fails as the stream ends puts INTERNAL in the place of its status (grpc#36066).
    is_replaced = refused.code == grpc.StatusCode.INTERNAL and not refused.status.details
    assert is_replaced or refused.reason == str(ended)


async def play(channel: grpc.aio.Channel, faults: list[str], history: dict[str, Any]) -> None:
    faults[:] = history.get("accidents", [])
    with save_if_failed("offsets", history):
        run = Play(channel, history["options"])
        await run.step("open")
        for step in history["steps"]:
            await run.step(*step)
        await run.end()


@pytest.mark.parametrize("history", saved_histories("offsets"))
async def test_history_that_once_failed_passes(
    channel: grpc.aio.Channel, faults: list[str], history: dict[str, Any]
) -> None:
    """Every history that has failed the test below is saved."""
    await play(channel, faults, history)


@seed(SEED)
@settings(
    deadline=None,
    max_examples=EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(history=HISTORIES)
async def test_streams_get_the_responses_of_the_model(
    channel: grpc.aio.Channel, faults: list[str], history: dict[str, Any]
) -> None:
    """At the end each row has its outcome, and each user exists once."""
    await play(channel, faults, history)
