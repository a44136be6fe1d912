"""Sections over the network: checked where they come in, folded, and part of every version."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.sections import with_sections
from fedpeft.adapters.spec import ADAPTER, Section, TensorSpec
from fedpeft.rpc import wire
from fedpeft.v1 import operator_service_pb2 as op

from ..conftest import SPEC as TUNED
from ..conftest import Arrays, Daemon, config, fault, header, zeros

SPEC = with_sections(TUNED, [Section("control", 8.0, "float32")])
CODEC = {"up": "float16", "down": "bfloat16"}


def changes(value: float, control: float) -> Arrays:
    return {t.name: np.full(t.shape, value if t.section == ADAPTER else control, np.float32) for t in SPEC.tensors}


async def test_a_section_is_folded_by_its_own_rule_and_comes_down_with_the_version(daemon: Daemon) -> None:
    run = await daemon.create(config(codec=CODEC, rounds={"count": 2, "clients": 2, "quorum": 2}), SPEC)
    clients = await daemon.clients("a", "b")
    for number in (1, 2):
        tasks = await asyncio.gather(*(client.task(run.id) for client in clients))
        for i, (client, task) in enumerate(zip(clients, tasks, strict=True)):
            await client.push(task.ticket, changes(0.5 + i, 1 / 3), 10 * (1 + 2 * i), "float16", SPEC)
        await daemon.until(run.id, lambda run, version=number: run.version == version)  # type: ignore[misc]
    version = await daemon.adapter(run.id, 2)
    assert version.keys() == {t.name for t in SPEC.tensors}
    for tensor in SPEC.tensors:
        third = np.float32(1 / 3)
        once = np.float32(2 * float(third) / 8)
        control = np.float32(float(once) + 2 * float(third) / 8)  # exact: the section goes as float32, both ways
        expected = 2 * (0.25 * 0.5 + 0.75 * 1.5) if tensor.section == ADAPTER else control
        assert set(version[tensor.name].flat) == {np.float32(expected)}
    (_, second) = await daemon.rounds(run.id)
    assert second.payload_bytes_up == 2 * (22 * 2 + 22 * 4)


def no_section(arrays: Arrays) -> tuple[Manifest, bytes]:
    return payload.encode(arrays, TUNED.sent(1), "float16")


def in_the_runs_encoding(arrays: Arrays) -> tuple[Manifest, bytes]:
    return payload.encode(arrays, [TensorSpec(t.name, t.shape) for t in SPEC.sent(1)], "float16")


def not_finite(arrays: Arrays) -> tuple[Manifest, bytes]:
    manifest, data = payload.encode(arrays, SPEC.sent(1), "float16")
    at = next(entry.offset for entry in manifest.entries if entry.name == "control/head.weight")
    return manifest, data[:at] + b"\0\0\xc0\x7f" + data[at + 4 :]


@pytest.mark.parametrize(
    ("make", "reason", "said"),
    [
        (no_section, "MANIFEST_INVALID", "tensor control/blocks.0.bias is missing"),
        (in_the_runs_encoding, "MANIFEST_INVALID", "tensor control/blocks.0.bias is encoded as 'float16'"),
        (not_finite, "PAYLOAD_INVALID", "tensor control/head.weight"),
    ],
)
async def test_a_section_that_is_wrong_is_refused_and_the_round_goes_on(
    daemon: Daemon, make: Callable[[Arrays], tuple[Manifest, bytes]], reason: str, said: str
) -> None:
    run = await daemon.create(
        config(codec=CODEC, rounds={"count": 1, "clients": 2, "quorum": 1, "deadline_s": 3}), SPEC
    )
    bad, good = await daemon.clients("bad", "good")
    tasks = await asyncio.gather(*(client.task(run.id) for client in (bad, good)))
    manifest, data = make(changes(1.0, 1.0))
    manifest = Manifest(manifest.entries, manifest.payload_bytes, hashlib.sha256(data).digest())
    error = await fault(bad.push_raw(header(tasks[0].ticket, manifest), [(0, data)]))
    assert error.reason == reason and said in error.message
    await good.push(tasks[1].ticket, changes(1.0, 1.0), 10, "float16", SPEC)
    await daemon.until(run.id, lambda run: run.version == 1)
    assert (await daemon.adapter(run.id, 1))["control/head.weight"][0, 0] == np.float32(1 / 8)


async def test_a_run_whose_sections_break_a_rule_is_refused(daemon: Daemon) -> None:
    manifest, data = payload.encode(zeros(SPEC), SPEC.shared, "float32")
    first = creation(manifest)
    first.spec.sections[0].divisor = 0
    error = await fault(daemon.create_raw(first, [(0, data)]))
    assert error.reason == "SPEC_INVALID" and "divisor is 0.0" in error.message
    assert error.fields[0][0] == "header.spec.tensors[1].section"


def creation(manifest: Manifest) -> op.CreateRunHeader:
    return op.CreateRunHeader(
        config=wire.config_to_proto(config(codec=CODEC)),
        spec=wire.spec_to_proto(SPEC),
        backbone_fingerprint="ab" * 32,
        manifest=wire.manifest_to_proto(manifest),
        request_id="r",
        model_parameters=1000,
    )
