"""Messages that carry a chunk: the same bytes as protobuf's, and no other reading of any bytes than protobuf's."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from fedpeft.rpc import chunk_messages
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import tensor_pb2

MESSAGES = [
    pb.PushUpdateRequest,
    pb.PullAdapterResponse,
    op.CreateRunRequest,
    op.SupplyVersionRequest,
    op.DownloadAdapterResponse,
    op.DownloadSumResponse,
]
OFFSETS = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.__name__)
@pytest.mark.parametrize("offset", [0, 1, 127, 128, 2**32, 2**64 - 1])
@pytest.mark.parametrize("size", [0, 1, 127, 128, 70_000])
def test_a_chunk_is_written_as_protobuf_writes_it_and_read_back(message: type, offset: int, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    written = chunk_messages.write(offset, data)
    assert message.FromString(written) == message(chunk=tensor_pb2.Chunk(offset=offset, data=data))
    if size:  # protobuf leaves out a field that is empty
        assert written == message(chunk=tensor_pb2.Chunk(offset=offset, data=data)).SerializeToString()
    found = chunk_messages.read(written)
    assert found is not None
    assert (found.offset, bytes(found.data)) == (offset, data)


def test_the_data_are_not_copied() -> None:
    message = chunk_messages.write(7, b"x" * 100)
    found = chunk_messages.read(message)
    assert found is not None
    assert found.data.obj is message


def agrees(message: bytes) -> None:
    """Checks that what is read of a message, if anything, is what protobuf reads."""
    found = chunk_messages.read(message)
    if found is not None:
        parsed = pb.PushUpdateRequest.FromString(message)
        assert parsed.WhichOneof("part") == "chunk"
        assert (parsed.chunk.offset, parsed.chunk.data) == (found.offset, bytes(found.data))


@given(st.binary(max_size=40))
@example(b"\x12\x00")
@example(b"\x12\x80\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01")
def test_no_bytes_are_read_otherwise_than_by_protobuf(message: bytes) -> None:
    try:
        agrees(message)
    except DecodeError:
        pytest.fail(f"{message!r} is no message, and was read")


@given(OFFSETS, st.binary(max_size=200), st.data())
def test_nor_are_those_of_a_damaged_message(offset: int, data: bytes, draw: st.DataObject) -> None:
    message = bytearray(chunk_messages.write(offset, data))
    place = draw.draw(st.integers(0, min(len(message) - 1, 16)))
    message[place] = draw.draw(st.integers(0, 255))
    try:
        agrees(bytes(message))
    except DecodeError:
        pytest.fail(f"{bytes(message)!r} is no message, and was read")


@pytest.mark.parametrize(
    "message",
    [
        pb.PushUpdateRequest(header=pb.UpdateHeader(ticket="t")).SerializeToString(),
        b"",
        b"\x12",
        b"\x12\x02\x12",  # ends too early
        b"\x12\x05\x12\x01x\x08\x01",  # the offset behind the data, which protobuf reads
        b"\x12\x03\x12\x01x\x12\x03\x12\x01y",  # two chunks, of which the last counts
        b"\x12\x0e\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x03\x12\x01x",  # an offset of more than 64 bits
    ],
)
def test_what_is_written_otherwise_is_left_to_protobuf(message: bytes) -> None:
    assert chunk_messages.read(message) is None
