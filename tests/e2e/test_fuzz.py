"""Random messages and random bytes to every RPC get only statuses that the contract names.

No such input causes an unexpected exception or a hang; whether a response is right is for other tests.
"""

import os
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode
from hypothesis import given, settings, strategies as st

from tests.support.bad_input import HASH
from tests.support.errors import Refusal
from tests.support.wire import RPCS, Wire

# Excluded are UNKNOWN, INTERNAL, UNAVAILABLE, and DEADLINE_EXCEEDED, which would mean a hang.
EXPECTED = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.ALREADY_EXISTS,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.ABORTED,
    StatusCode.UNIMPLEMENTED,
}
# More examples find rarer inputs: ROSTER_TEST_EXAMPLES=2000 takes twenty minutes.
FUZZ = settings(deadline=None, max_examples=int(os.environ.get("ROSTER_TEST_EXAMPLES", "25")))

# Texts that pass the first check of a field and reach the next one.
PLAUSIBLE = ["ada@example.org", "id", "created_at desc", "email", "*", 'email : "a" OR NOT id < 3', HASH]
TEXTS = st.sampled_from(PLAUSIBLE) | st.text(st.characters(codec="utf-8"), max_size=20)
VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: st.integers(0, 9) | st.integers(-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(0, 3) | st.integers(-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_STRING: TEXTS,
}


def messages(kind: Descriptor, depth: int = 3) -> st.SearchStrategy[dict[str, Any]]:
    """Return a strategy for the fields of a message, nested at most `depth` levels deep."""
    chosen: dict[str, st.SearchStrategy[Any]] = {}
    for field in kind.fields:
        if field.message_type and not depth:
            continue
        value = messages(field.message_type, depth - 1) if field.message_type else VALUES[field.cpp_type]
        chosen[field.name] = st.lists(value, max_size=3) if field.is_repeated else value
    return st.fixed_dictionaries({}, optional=chosen)


async def code_of(wire: Wire, rpc: str, *sent: Any) -> Any:
    try:
        await wire.call(rpc, *sent)
    except grpc.RpcError as error:
        return Refusal(error).code
    return StatusCode.OK


@pytest.mark.parametrize("rpc", RPCS)
@FUZZ
@given(data=st.data())
async def test_any_fields_get_a_status_of_the_contract(wire: Wire, rpc: str, data: st.DataObject) -> None:
    """Fields have the right types and any values; a stream has up to three messages."""
    sent = data.draw(st.lists(messages(RPCS[rpc].input_type), min_size=1, max_size=3))

    assert await code_of(wire, rpc, *sent) in EXPECTED


@pytest.mark.parametrize("rpc", RPCS)
@FUZZ
@given(bytes_=st.binary(max_size=100))
async def test_any_bytes_get_a_status_of_the_contract(wire: Wire, rpc: str, bytes_: bytes) -> None:
    """Bytes that are a message are treated as one; all others are refused as invalid."""
    expected = EXPECTED if is_message(rpc, bytes_) else {StatusCode.INVALID_ARGUMENT}

    assert await code_of(wire, rpc, bytes_) in expected


def is_message(rpc: str, bytes_: bytes) -> bool:
    try:
        GetMessageClass(RPCS[rpc].input_type).FromString(bytes_)
    except DecodeError:
        return False
    return True
