"""Memory of a daemon: what a run's first version and a fold take does not grow with the size of an adapter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import grpc
import numpy as np

from fedpeft.adapters import payload
from fedpeft.adapters.payload import CHUNK_BYTES
from fedpeft.adapters.spec import AdapterSpec, TensorSpec

from ..ports import free_port
from .conftest import Daemon, config, header, zeros
from .test_process import running

MIB = 1024 * 1024
ADAPTER = AdapterSpec.of("bias", [TensorSpec(f"blocks.{i:02}.bias", (MIB // 4,)) for i in range(40)])
"""40 MiB."""


class Peak:
    """The most resident memory of a process since this was made."""

    def __init__(self, pid: int) -> None:
        self._folder = Path("/proc", str(pid))
        (self._folder / "clear_refs").write_text("5")
        self._before = self._bytes("VmRSS")

    def growth(self) -> int:
        """Returns by how many bytes it is above what the process had at the beginning."""
        return self._bytes("VmHWM") - self._before

    def _bytes(self, field: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


async def test_neither_a_new_run_nor_a_fold_holds_an_adapter(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, "--metrics", "", port=port) as process:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            daemon = Daemon(cast(Any, None), channel, cast(Any, None))  # in another process: there are no parts
            peak = Peak(process.pid)
            run = await daemon.create(config(rounds={"count": 1, "clients": 1}), ADAPTER, zeros(ADAPTER))
            assert peak.growth() < 32 * MIB

            (client,) = await daemon.clients("a")
            task = await client.task()
            update = {t.name: np.ones(t.shape, np.float32) for t in ADAPTER.shared}
            manifest, data = payload.encode(update, ADAPTER.sent(1), "float32")
            pieces = [(start, data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]
            peak = Peak(process.pid)
            await client.push_raw(header(task.ticket, manifest), pieces)
            await daemon.until(run.id, lambda r: r.version == 1, seconds=60)
            assert await asyncio.to_thread(peak.growth) < 32 * MIB


async def test_a_tensor_above_any_message_travels_and_rounds_leave_nothing_in_memory(tmp_path: Path) -> None:
    """A message of gRPC has at most 4 MiB. Sixteen rounds would take 96 MiB more if one copy stayed of each."""
    values = 6 * MIB // 4
    spec, port = AdapterSpec.of("bias", [TensorSpec("head.weight", (values,))]), free_port()
    manifest, data = payload.encode({"head.weight": np.ones(values, np.float32)}, spec.sent(1), "float32")
    pieces = [(start, data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)]
    peaks: list[int] = []
    with running(tmp_path, "--metrics", "", port=port) as process:
        peak = Peak(process.pid)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            daemon = Daemon(cast(Any, None), channel, cast(Any, None))
            run = await daemon.create(config(rounds={"count": 20, "clients": 1}), spec, zeros(spec))
            (client,) = await daemon.clients("a")
            for _ in range(20):
                task = await client.task()
                await client.push_raw(header(task.ticket, manifest), pieces)
                await daemon.until(run.id, lambda r, wanted=task.round: r.version == wanted, seconds=60)  # type: ignore[misc]
                peaks.append(await asyncio.to_thread(peak.growth))
    assert peaks[19] - peaks[3] < 32 * MIB
