"""Rounds over the network beside Flower's, NVFlare's and a bare gRPC stream of the same bytes, in one run.

    python benchmarks/frameworks.py [--payload small large] [--clients 8] [--rounds 6] [--turns 2] [--out FILE]

Each client adds one to every value and sends all of it back, in no time of its own; the server takes the mean. All
processes are on this machine, on loopback in plain text, with the settings that each framework has without a word:
Flower's SuperLink with its database in a file, NVFlare's provisioned proof of concept (which is over TLS). Each has an
environment of its own, made on first use in build/peers. The cases take turns. A round is the time from the end of one
to the end of the next, medians without the first; memory is the most that each process of the server's has had, added
up. The bare stream is up and down, stores nothing and adds nothing; ours is durable.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "federations")]

import bare_stream  # noqa: E402
import flower  # noqa: E402
import nv_flare  # noqa: E402
import round as one_round  # noqa: E402
from processes import SILENT_S, Processes, Work  # noqa: E402
from simulators import environment  # noqa: E402
from workload import PAYLOADS, machine, payload_bytes, scratch  # noqa: E402

from fedpeft_operator.federation.process_group import free_ports  # noqa: E402

LOOK_S = 0.5
Measured = dict[str, float]


def of_bare(payload: str, clients: int, rounds: int) -> Measured:
    """Measures the bare stream."""
    found = bare_stream.measure(payload, clients, rounds - 1)
    return {"round_s": found["up_s"] + found["down_s"], "server_peak_bytes": found["server_peak_bytes"]}


def of_ours(payload: str, clients: int, rounds: int) -> Measured:
    """Measures our daemon."""
    found = one_round.measure(payload, clients, rounds - 1)
    return {"round_s": found["cycle_s"], "server_peak_bytes": found["server_peak_bytes"]}


def of_flower(payload: str, clients: int, rounds: int) -> Measured:
    """Measures Flower."""
    programs = Path(environment("flower")).parent
    with scratch() as folder:
        work, port = _work(payload, clients, rounds), free_ports(clients + 1)[0]
        with flower.federation(folder, programs, port, "subprocess", work) as (found, processes):
            return _watched(processes, "superlink", lambda: [at for *_, at in found.rounds()], rounds)


def of_nvflare(payload: str, clients: int, rounds: int) -> Measured:
    """Measures NVFlare, whose server says when rounds begin: of one more than are asked for."""
    programs = Path(environment("nvflare")).parent
    with scratch() as folder:
        work = _work(payload, clients, rounds + 1)
        with nv_flare.federation(folder, programs, work) as (found, processes):
            return _watched(processes, "server", lambda: sorted(found.began().values())[1:], rounds)


CASES: dict[str, Callable[[str, int, int], Measured]] = {
    "bare stream": of_bare,
    "FedPEFT": of_ours,
    "Flower": of_flower,
    "NVFlare": of_nvflare,
}


def _work(payload: str, clients: int, rounds: int) -> Work:
    return Work(rounds, clients, payload_bytes(payload) // 4, client_s=0.0)


def _watched(processes: Processes, server: str, ends: Callable[[], list[float]], rounds: int) -> Measured:
    """Waits for as many rounds.

    Raises:
        RuntimeError: If none ends for long, with the last words of the server.
    """
    peaks: dict[int, int] = {}
    found, moved = ends(), time.monotonic()
    while len(found) < rounds:
        time.sleep(LOOK_S)
        processes.peak_bytes(server, peaks)
        before, found = len(found), ends()
        if len(found) > before:
            moved = time.monotonic()
        if time.monotonic() - moved > SILENT_S:
            raise RuntimeError(f"{len(found)} of {rounds} rounds in {SILENT_S:.0f} s:\n{processes.log(server)[-2000:]}")
    cycles = [after - before for before, after in itertools.pairwise(found)]
    return {"round_s": statistics.median(cycles), "server_peak_bytes": sum(peaks.values())}


def versions() -> dict[str, str]:
    """Returns the version of each framework."""
    say = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    places = {
        "FedPEFT": (sys.executable, "fedpeft"),
        "Flower": (environment("flower"), "flwr"),
        "NVFlare": (environment("nvflare"), "nvflare"),
        "bare stream": (sys.executable, "grpcio"),
    }
    return {
        name: subprocess.run([python, "-c", say, package], check=True, capture_output=True, text=True).stdout.strip()
        for name, (python, package) in places.items()
    }


def summary(turns: list[dict[str, Measured]]) -> dict[str, Measured]:
    """Returns the medians of each case, and the median of its rounds over the bare stream's of the same turn."""
    found = {}
    for name in turns[0]:
        each = [turn[name] for turn in turns]
        ratios = [turn[name]["round_s"] / turn["bare stream"]["round_s"] for turn in turns]
        found[name] = {key: statistics.median(one[key] for one in each) for key in each[0]}
        found[name]["over_bare"] = statistics.median(ratios)
    return found


def main() -> None:
    """Prints a table for each payload, and writes all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--payload", nargs="+", choices=list(PAYLOADS), default=list(PAYLOADS))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "frameworks.json")
    chosen = parser.parse_args()
    written: dict[str, Any] = {"machine": machine(), "versions": versions(), "clients": chosen.clients, "payloads": {}}
    for payload in chosen.payload:
        turns = []
        for _ in range(chosen.turns):
            turns.append({name: case(payload, chosen.clients, chosen.rounds) for name, case in CASES.items()})
        found = summary(turns)
        written["payloads"][payload] = {"medians": found, "turns": turns}
        print(f"\n{payload}, {payload_bytes(payload) / 1e6:.2f} MB, {chosen.clients} clients")
        print("| | a round, s | over the bare stream | server memory, MB |\n|---|--:|--:|--:|")
        for name, one in found.items():
            version = written["versions"][name]
            memory = one["server_peak_bytes"] / 1e6
            print(f"| {name} ({version}) | {one['round_s']:.3f} | {one['over_bare']:.1f} | {memory:.0f} |", flush=True)
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
