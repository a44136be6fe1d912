"""A client's description of itself when it registers."""

from __future__ import annotations

import grpc
import pytest

from fedpeft.rpc.status import from_rpc_error
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.rpc.sessions import Session

from ..conftest import Daemon


async def say(daemon: Daemon, capabilities: fed.Capabilities) -> fed.RegisterResponse:
    client = daemon.client("a")
    request = fed.RegisterRequest(
        min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, capabilities=capabilities
    )
    return await client.stub.Register(request, metadata=client.metadata)


@pytest.mark.parametrize(
    ("field", "capabilities"),
    [
        ("software", fed.Capabilities(software="x" * 257)),
        ("device", fed.Capabilities(device="x" * 60_000)),
        ("methods", fed.Capabilities(methods=["bias"] * 65)),
        ("methods", fed.Capabilities(methods=["x" * 65])),
        ("encodings", fed.Capabilities(encodings=[""])),
        ("examples", fed.Capabilities(examples=2**64 - 1)),
        ("examples", fed.Capabilities(examples=10**9 + 1)),
    ],
)
async def test_too_much_is_refused_with_its_field_and_nobody_is_registered(
    daemon: Daemon, field: str, capabilities: fed.Capabilities
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await say(daemon, capabilities)
    error = from_rpc_error(caught.value)
    assert error.reason == "CAPABILITIES_INVALID"
    assert [name for name, _ in error.fields] == [f"capabilities.{field}"]
    assert not (await daemon.operator.ListClients(op.ListClientsRequest())).clients


async def test_nothing_of_it_steers_the_operators_terminal(daemon: Daemon) -> None:
    steering = "\x1b[2J"
    await say(daemon, fed.Capabilities(software=steering, device=steering, methods=[steering], encodings=[steering]))
    (client,) = (await daemon.operator.ListClients(op.ListClientsRequest())).clients
    kept = client.capabilities
    assert {kept.software, kept.device, *kept.methods, *kept.encodings} == {" [2J"}


async def test_what_this_server_does_not_know_is_not_kept(daemon: Daemon) -> None:
    known = fed.Capabilities(
        software="fedpeft 0.1.0", device="cpu", methods=["bias"], encodings=["float32"], examples=7
    )
    newer = fed.Capabilities.FromString(known.SerializeToString() + b"\xfa\x07\x83\x08" + b"x" * 1027)  # field 127
    assert newer.ByteSize() > 1000
    await say(daemon, newer)
    (client,) = (await daemon.operator.ListClients(op.ListClientsRequest())).clients
    assert client.capabilities == known
    assert client.capabilities.ByteSize() == known.ByteSize()


@pytest.mark.parametrize(
    ("earlier", "said"), [(["1" * 32] * 65, "are 65; at most 64"), (["x"], "32 hexadecimal digits")]
)
async def test_earlier_processes_are_bounded(daemon: Daemon, earlier: list[str], said: str) -> None:
    client = daemon.client("a")
    request = fed.RegisterRequest(
        min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, earlier_processes=earlier
    )
    with pytest.raises(grpc.aio.AioRpcError, match=said) as caught:
        await client.stub.Register(request, metadata=client.metadata)
    assert [name for name, _ in from_rpc_error(caught.value).fields] == ["earlier_processes"]


async def test_a_new_id_does_not_begin_with_a_hyphen_and_an_old_one_goes_on(daemon: Daemon) -> None:
    (known,) = await daemon.clients("old")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await daemon.client("-x").register()
    assert from_rpc_error(caught.value).reason == "CLIENT_ID_INVALID"
    assert "begins with a hyphen" in (caught.value.details() or "")
    sessions = daemon.server.sessions
    sessions._sessions["-old"] = Session("0" * 32)  # registered with a release that allowed it
    await daemon.client("-old").register()
    await known.register()
    listed = (await daemon.operator.ListClients(op.ListClientsRequest())).clients
    assert [client.id for client in listed] == ["-old", "old"]
