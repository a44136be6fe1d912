"""A round of a real `fedpeft-server`, with clients that do not train: time, memory, bytes.

The server makes every update durable before its receipt, checks it, folds, and commits; the clients are
`benchmarks/clients.py`, in one process.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from workload import (
    HERE,
    PAYLOADS,
    Daemon,
    daemon,
    payload_bytes,
    peak_memory_bytes,
    print_measured,
    processor_seconds,
    scratch,
)

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.api.operator_client import OperatorClient
from fedpeft.config import RunConfig, parse_config
from fedpeft.rpc import wire
from fedpeft.v1 import run_pb2


def synthetic_spec(payload: str) -> AdapterSpec:
    """The spec of a payload of `workload.PAYLOADS`."""
    tensors, values = PAYLOADS[payload]
    return AdapterSpec.of("bias", (TensorSpec(f"blocks.{i}.bias", (values,)) for i in range(tensors)))


def config(clients: int, rounds: int, method: str = "bias") -> RunConfig:
    """A run of as many clients and rounds, dense float32 both ways."""
    return parse_config(
        {
            "name": "benchmark",
            "model": {"name": "vit_base_patch16_224", "weights": "none", "classes": [f"c{i}" for i in range(100)]},
            "peft": {"method": method},
            "rounds": {"count": rounds, "clients": clients, "deadline_s": 3600},
        }
    )


def create(server: Daemon, spec: AdapterSpec, clients: int, rounds: int) -> str:
    """Creates a run whose adapter starts at zero; returns its id."""

    async def call() -> str:
        zeros = {t.name: np.zeros(t.shape, np.float32) for t in spec.shared}
        async with OperatorClient(server.address, server.identity) as operator:
            run = await operator.create_run(config(clients, rounds, spec.method), spec, "0" * 64, zeros, 0)
        return run.id

    return asyncio.run(call())


def rounds_of(server: Daemon, run: str) -> list[run_pb2.Round]:
    """The committed rounds of a run."""

    async def call() -> list[run_pb2.Round]:
        async with OperatorClient(server.address, server.identity) as operator:
            found = await operator.rounds(run)
        return [r for r in found if r.phase == run_pb2.ROUND_PHASE_COMMITTED]

    return asyncio.run(call())


def push_all(server: Daemon, run: str, spec: AdapterSpec, clients: int, folder: Path) -> None:
    """Lets clients work in a process of their own until the run is finished."""
    file = folder / "spec.bin"
    file.write_bytes(wire.spec_to_proto(spec).SerializeToString())
    command = [sys.executable, str(HERE / "clients.py"), "--server", server.address, "--run", run]
    if server.identity:
        server.enroll(folder, clients)
        command += ["--identities", str(folder / "identities")]
    subprocess.run([*command, "--clients", str(clients), "--spec", str(file)], check=True, stdout=subprocess.DEVNULL)


def measure(payload: str, clients: int, repeat: int, warm_up: int = 1, *, tls: bool = False) -> dict[str, Any]:
    """Holds `warm_up + repeat` rounds; medians in seconds over the last `repeat`, memory in bytes.

    `round_s` is from the first ticket to the commit; `cycle_s` from commit to commit, the clients' asking included.
    `server_processor_s_per_gb` is the server's own processor time for each GB of payload, up and down alike.
    """
    spec = synthetic_spec(payload)
    with scratch() as folder, daemon(folder, tls=tls) as server:
        idle = peak_memory_bytes(server.pid)
        run = create(server, spec, clients, warm_up + repeat)
        created, before = server.counters(run), processor_seconds(server.pid)
        push_all(server, run, spec, clients, folder)
        worked_s = processor_seconds(server.pid) - before
        moved = {k: v - created[k] for k, v in server.counters(run).items()}
        rounds = rounds_of(server, run)
        if len(rounds) != warm_up + repeat:
            raise RuntimeError(f"{len(rounds)} rounds are committed, not {warm_up + repeat}")
        ends = [r.committed_at.ToNanoseconds() / 1e9 for r in rounds]
        times = [e - r.opened_at.ToNanoseconds() / 1e9 for r, e in zip(rounds, ends, strict=True)][warm_up:]
        cycles = [b - a for a, b in itertools.pairwise(ends)][warm_up - 1 :]
        expected = payload_bytes(payload) * clients * len(rounds)
        if moved["payload_up"] != expected:
            raise RuntimeError(f"the server counted {moved['payload_up']:.0f} payload bytes up, not {expected}")
        return {
            "round_s": statistics.median(times),
            "cycle_s": statistics.median(cycles),
            "all_rounds_s": times,
            "server_idle_bytes": idle,
            "server_processor_s_per_gb": worked_s / ((moved["payload_up"] + moved["payload_down"]) / 1e9),
            "server_peak_bytes": peak_memory_bytes(server.pid),
            "wire_over_payload_up": moved["wire_up"] / moved["payload_up"],
            "wire_over_payload_down": moved["wire_down"] / moved["payload_down"],
        }


def main() -> None:
    print_measured(measure, str(__doc__))


if __name__ == "__main__":
    main()
