"""Many clients that wait, few of them sampled each round: joining, memory, an idle server's work, and rounds.

The clients are `benchmarks/crowd.py`, in a process of their own, 50 on each connection. What gRPC itself takes for a
call that waits is measured on a bare `grpc.aio` server of the same options, on which as many calls wait, in the same
run. Memory is the kernel's VmRSS, processor time that of the daemon with all its threads.

The server is called idle when all clients have joined, the sampled ones hold their tickets, and nothing arrives but the
calls of those who wait, each held as long as the server asked for.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from round import create, rounds_of, synthetic_spec
from workload import (
    HERE,
    Daemon,
    daemon,
    free_address,
    machine,
    process,
    processor_seconds,
    resident_bytes,
    scratch,
)

from fedpeft.api.operator_client import OperatorClient
from fedpeft.process import durable
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft_server.access import bounds
from fedpeft_server.rpc import connections

TARGETS = {"joined_s": 60.0, "beyond_grpc_kb": 20.0, "idle_share": 0.03, "round_s": 1.5, "growth_ratio": 1.05}
"""The most of each figure; `growth_ratio` is the memory after the last round by that after the first."""
LOOK_S = 0.5
SETTLE_S = 30.0
"""Time after which every waiting client has heard how long its calls are held: the first is held for 20 seconds."""


def until(child: subprocess.Popen[str], met: Callable[[], bool], most_s: float, what: str) -> float:
    """Waits until something is so, as long as the clients live; returns how long that took, seconds."""
    began = time.monotonic()
    while not met():
        if time.monotonic() - began > most_s:
            raise RuntimeError(f"{what}: not within {most_s:.0f} s")
        if child.poll():
            raise RuntimeError(f"{what}: the clients' process failed with exit code {child.returncode}")
        time.sleep(LOOK_S)
    took = time.monotonic() - began
    print(f"{what}: {took:.1f} s", file=sys.stderr, flush=True)
    return took


def gauge(server: Daemon, run: str, name: str, label: str = "") -> int:
    """Returns a value of a run from /metrics, 0 before there is one; no call of the operator's service is made."""
    mine = [line for line in server.samples() if line.startswith(f"{name}{{") and run in line and label in line]
    return int(float(mine[0].rpartition(" ")[2])) if mine else 0


def waiting(server: Daemon, run: str) -> int:
    """Returns the number of clients that a run may sample."""
    return gauge(server, run, "fedpeft_clients", '"waiting"')


@contextmanager
def crowd(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The clients' process; it is ended with the block."""
    command = [sys.executable, str(HERE / "crowd.py"), *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


class Bare(pb_grpc.FederationServiceServicer):
    """Calls that wait, and nothing else."""

    async def AwaitRound(self, request: Any, context: Any) -> Any:
        """Waits until the server ends."""
        await asyncio.Event().wait()


async def serve_bare(address: str) -> None:
    """Serves calls that wait on an address, with the options of a FedPEFT server."""
    server = grpc.aio.server(options=connections.options(bounds.MAIN))
    pb_grpc.add_FederationServiceServicer_to_server(Bare(), server)
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


def measure_bare(clients: int) -> float:
    """Bytes of a bare server's memory for each call that waits on it."""
    address = free_address()
    with scratch() as folder, process([__file__, "--bare", address], address, folder / "bare.log") as pid:
        before, last = resident_bytes(pid), [0]

        def is_flat() -> bool:
            last.append(resident_bytes(pid))
            return len(last) > 8 and last[-1] > before + 1000 * clients and last[-1] == last[-4]

        with crowd("bare", address, str(clients)) as child:
            until(child, is_flat, 300, f"{clients} bare calls")
            return (resident_bytes(pid) - before) / clients


async def _ask(server: Daemon, call: Callable[[OperatorClient], Awaitable[object]]) -> None:
    async with OperatorClient(server.address, server.identity) as operator:
        await call(operator)


def measure(clients: int, sampled: int, rounds: int, idle_s: float, join_s: float) -> dict[str, Any]:
    """Lets all join, be idle, and hold rounds."""
    spec, bare = synthetic_spec("small"), measure_bare(clients)
    with scratch() as folder, daemon(folder) as server:
        before = resident_bytes(server.pid)
        run = create(server, spec, sampled, rounds)
        asyncio.run(_ask(server, lambda operator: operator.pause(run)))
        file = folder / "spec.bin"
        file.write_bytes(wire.spec_to_proto(spec).SerializeToString())
        with crowd("join", server.address, str(clients), run, str(file)) as child:
            joined_s = until(child, lambda: waiting(server, run) >= clients, join_s, f"{clients} clients joined")
            joined = resident_bytes(server.pid)
            asyncio.run(_ask(server, lambda operator: operator.resume(run)))
            until(child, lambda: waiting(server, run) <= clients - sampled, 60, "the first round opened")
            time.sleep(SETTLE_S)
            settled_s = processor_seconds(server.pid)
            time.sleep(idle_s)
            idle_over_s = processor_seconds(server.pid)
            memory = _hold_rounds(server, run, child, rounds)
            rounds_over_s = processor_seconds(server.pid)
            done = json.loads(child.communicate(timeout=60)[0])
        held = rounds_of(server, run)
    ends = [r.committed_at.ToNanoseconds() / 1e9 for r in held]
    cycles = [b - a for a, b in itertools.pairwise(ends)]
    return {
        "clients": clients,
        "sampled": sampled,
        "rounds": rounds,
        "joined_s": joined_s,
        "bare_kb": bare / 1000,
        "each_kb": (joined - before) / clients / 1000,
        "beyond_grpc_kb": ((joined - before) / clients - bare) / 1000,
        "idle_share": (idle_over_s - settled_s) / idle_s,
        "round_processor_s": (rounds_over_s - idle_over_s) / rounds,
        "load": os.getloadavg()[0],
        "round_s": statistics.median(cycles),
        "slowest_round_s": max(cycles),
        "growth_ratio": memory[-1] / memory[0],
        "memory_bytes": memory,
        **done,
    }


def _hold_rounds(server: Daemon, run: str, child: subprocess.Popen[str], rounds: int) -> list[int]:
    """Lets the clients push; returns the server's memory after the first round and at each later look."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write("go\n")
    child.stdin.flush()
    memory: list[int] = []

    def is_finished() -> bool:
        held = gauge(server, run, "fedpeft_rounds_total", '"committed"')
        if held:
            memory.append(resident_bytes(server.pid))
        return held >= rounds

    until(child, is_finished, 60 + 30 * rounds, f"{rounds} rounds")
    return memory


def show(found: dict[str, Any]) -> None:
    """Prints the figures beside the targets."""
    print(f"\n{found['clients']} clients, {found['sampled']} sampled a round, {found['rounds']} rounds")
    print(f"{'':34}{'measured':>10}{'at most':>10}{'of that':>10}")
    lines = {
        "joined_s": "all joined, s",
        "beyond_grpc_kb": "memory each beyond gRPC's own, kB",
        "idle_share": "share of a core when idle",
        "round_s": "commit to commit, s (median)",
        "growth_ratio": "memory, last round / first",
    }
    for key, title in lines.items():
        most = TARGETS[key]
        print(f"{title:34}{found[key]:>10.3f}{most:>10.2f}{found[key] / most:>10.2f}")
    print(f"memory each, kB: {found['each_kb']:.1f}, of a bare gRPC server {found['bare_kb']:.1f}; ", end="")
    print(f"slowest round {found['slowest_round_s']:.2f} s")
    print(f"server's processor time a round: {found['round_processor_s']:.2f} s; ", end="")
    print(f"load of the machine at the end: {found['load']:.1f}")
    print(f"calls repeated because their stream or connection failed: {found['repeated'] or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--sampled", type=int, default=100, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds for which an idle server is watched")
    parser.add_argument("--join", type=float, default=600.0, help="seconds after which clients that did not join fail")
    parser.add_argument("--out", type=Path, help="folder for many.json")
    parser.add_argument("--bare", metavar="ADDRESS", help="serve calls that wait, for comparison, and nothing else")
    chosen = parser.parse_args()
    if chosen.bare:
        return asyncio.run(serve_bare(chosen.bare))
    found = measure(chosen.clients, chosen.sampled, chosen.rounds, chosen.idle, chosen.join)
    show(found)
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        results = {"machine": machine(), "targets": TARGETS, "many": found}
        durable.write_text(chosen.out / "many.json", json.dumps(results, indent=2) + "\n")
        print(f"\nwrote {chosen.out / 'many.json'}")


if __name__ == "__main__":
    main()
