"""The calls of an edge's agent, against an OperatorService on a real socket."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedpeft.adapters.payload import CHUNK_BYTES
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.api import operator_client
from fedpeft.api.operator_client import OperatorClient
from fedpeft.config import parse_config
from fedpeft.errors import ChecksumMismatch, Draining, RunNotFound, StateInvalid, SumNotFound, VersionSuperseded
from fedpeft.v1 import operator_service_pb2 as pb
from fedpeft.v1 import tensor_pb2

from ..operator.operator_double import Double, Serving, a_run, serving

RUN = "run-0123456789ab"
SPEC = AdapterSpec.of("bias", [TensorSpec("a", (4,)), TensorSpec("b", (3,), (TensorRole.LOCAL,))])
TENSORS = {"a": np.arange(4, dtype=np.float32)}


def relays(version: int, run: str = RUN) -> pb.Relay:
    return pb.Relay(run=run, version=version, client="north")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(operator_client, "PAUSE_S", 0.01)
    with serving(Double()) as answer:
        yield answer


async def test_a_run_is_created_for_a_parents_run_with_its_id_and_version(served: Serving) -> None:
    config = parse_config({"model": {"name": "vit_tiny", "classes": ["cat", "dog"]}, "peft": {"method": "bias"}})
    async with OperatorClient(served.address) as client:
        run = await client.create_run(config, SPEC, "ab" * 32, TENSORS, 10, relays=relays(3))
        await client.create_run(config, SPEC, "ab" * 32, TENSORS, 10)
    (header, _), (other, _) = served.double.created.values()
    assert (run.id, run.version, header.relays) == (RUN, 3, relays(3))
    assert not other.HasField("relays")


async def test_a_version_is_supplied_in_chunks_and_again_after_a_break(served: Serving) -> None:
    served.double.runs = {RUN: a_run()}
    served.double.failures["SupplyVersion"] = [Draining("the server is shutting down")]
    size = CHUNK_BYTES // 4 + 5
    spec = AdapterSpec.of("bias", [TensorSpec("a", (size,)), *SPEC.tensors[1:]])
    tensors, seen = {"a": np.arange(size, dtype=np.float32)}, list[tuple[int, int]]()
    async with OperatorClient(served.address) as client:
        run = await client.supply_version(relays(2), spec, tensors, progress=lambda *each: seen.append(each))
        assert run.version == 2 and seen[-1] == (4 * size, 4 * size)
        with pytest.raises(VersionSuperseded, match="version 2"):
            await client.supply_version(relays(1), SPEC, TENSORS)
        with pytest.raises(RunNotFound):
            await client.supply_version(relays(1, "run-b"), SPEC, TENSORS)
    ((header, data),) = served.double.supplied
    assert (header.run, header.version, header.client, data) == (RUN, 2, "north", tensors["a"].tobytes())
    assert [(each.name, each.encoding) for each in header.manifest.tensors] == [("a", "float32")]


async def test_a_sum_is_downloaded_from_where_it_broke_off_and_checked(served: Serving, tmp_path: Path) -> None:
    data = bytes(range(256)) * 20
    manifest = tensor_pb2.Manifest(payload_bytes=len(data), sha256=hashlib.sha256(data).digest())
    header = pb.DownloadSumHeader(manifest=manifest, examples=70, metrics={"loss": 0.5, "updates": 3})
    served.double.sums[RUN, 4] = header, data
    served.double.break_download_after = [2000, 4000]
    path = tmp_path / "sum"
    async with OperatorClient(served.address) as client:
        assert await client.download_sum(RUN, 4, path) == header
        assert path.read_bytes() == data and served.double.asked == ["DownloadSum"] * 3
        with pytest.raises(SumNotFound, match="round 5"):
            await client.download_sum(RUN, 5, tmp_path / "other")
        served.double.sums[RUN, 4] = header, data[:-1] + b"x"
        with pytest.raises(ChecksumMismatch, match=f"the sum of round 4 of {RUN} arrived with another sha256"):
            await client.download_sum(RUN, 4, tmp_path / "other")
        with pytest.raises(StateInvalid, match="No such file"):
            await client.download_sum(RUN, 4, tmp_path / "absent" / "sum")
    assert os.listdir(tmp_path) == ["sum"]
