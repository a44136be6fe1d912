"""`make bench`: rounds beside bare streams, interleaved in one run, then memory for 8 and 64 clients, then the bytes.

Writes `bench.json` and prints the same as tables. Only ratios and bytes mean something on another machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import bare_stream
import bytes_by_method
import round as one_round
from workload import PAYLOADS, machine, payload_bytes

from fedpeft.process import durable

CLIENTS, MANY = 8, 64


def interleaved(payload: str, turns: int, repeat: int) -> dict[str, Any]:
    """Bare, ours in plain text, and ours over TLS in turns; medians of each side's medians."""
    bare, ours, secured = [], [], []
    for _ in range(turns):
        bare.append(bare_stream.measure(payload, CLIENTS, repeat))
        ours.append(one_round.measure(payload, CLIENTS, repeat))
        secured.append(one_round.measure(payload, CLIENTS, repeat, tls=True))
    up, down = (statistics.median(b[k] for b in bare) for k in ("up_s", "down_s"))
    seconds = statistics.median(o["round_s"] for o in ours)
    bare_work, work = (statistics.median(m["server_processor_s_per_gb"] for m in each) for each in (bare, ours))
    over_tls = statistics.median(s["round_s"] for s in secured)
    return {
        "payload_bytes": payload_bytes(payload),
        "clients": CLIENTS,
        "bare_up_s": up,
        "bare_down_s": down,
        "round_s": seconds,
        "cycle_s": statistics.median(o["cycle_s"] for o in ours),
        "round_over_bare": seconds / (up + down),
        "round_tls_s": over_tls,
        "tls_over_plain": over_tls / seconds,
        "bare_processor_s_per_gb": bare_work,
        "processor_s_per_gb": work,
        "processor_over_bare": work / bare_work,
        "bare_server_peak_bytes": max(b["server_peak_bytes"] for b in bare),
        "server_peak_bytes": max(o["server_peak_bytes"] for o in ours),
        "wire_over_payload_up": ours[0]["wire_over_payload_up"],
        "wire_over_payload_down": ours[0]["wire_over_payload_down"],
        "turns": {"bare": bare, "ours": ours, "ours_over_tls": secured},
    }


def show_rounds(results: dict[str, Any]) -> None:
    print(f"\n{CLIENTS} clients, medians     " + "".join(f"{p:>12}" for p in results))
    lines = {
        "payload, MB": lambda r: f"{r['payload_bytes'] / 1e6:.2f}",
        "bare stream up, s": lambda r: f"{r['bare_up_s']:.3f}",
        "bare stream down, s": lambda r: f"{r['bare_down_s']:.3f}",
        "a round, s": lambda r: f"{r['round_s']:.3f}",
        "commit to commit, s": lambda r: f"{r['cycle_s']:.3f}",
        "round / bare up + down": lambda r: f"{r['round_over_bare']:.2f}",
        "a round over TLS, s": lambda r: f"{r['round_tls_s']:.3f}",
        "TLS / plain text": lambda r: f"{r['tls_over_plain']:.2f}",
        "server, CPU s / GB": lambda r: f"{r['processor_s_per_gb']:.2f}",
        "of it / bare": lambda r: f"{r['processor_over_bare']:.2f}",
        "bare server memory, MB": lambda r: f"{r['bare_server_peak_bytes'] / 1e6:.0f}",
        "server memory, MB": lambda r: f"{r['server_peak_bytes'] / 1e6:.0f}",
        "wire / payload up": lambda r: f"{r['wire_over_payload_up']:.4f}",
        "wire / payload down": lambda r: f"{r['wire_over_payload_down']:.4f}",
    }
    for title, cell in lines.items():
        print(f"{title:24}" + "".join(f"{cell(r):>12}" for r in results.values()))


def memory(few: dict[str, Any], repeat: int) -> dict[str, Any]:
    """The server's peak memory with the large payload: 8 clients, as measured before, and 64."""
    many = one_round.measure("large", MANY, repeat)
    return {
        str(CLIENTS): few["server_peak_bytes"],
        str(MANY): many["server_peak_bytes"],
        "ratio": many["server_peak_bytes"] / few["server_peak_bytes"],
        "round_s": {str(CLIENTS): few["round_s"], str(MANY): many["round_s"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for bench.json")
    parser.add_argument("--turns", type=int, default=3, help="turns of bare and ours")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions or rounds a turn, after one to warm up")
    parser.add_argument("--without-bytes", action="store_true", help="leave out the bytes of each PEFT method")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, Any] = {}
    for payload in PAYLOADS:
        print(f"{payload}: {chosen.turns} turns of bare streams and rounds...", flush=True)
        rounds[payload] = interleaved(payload, chosen.turns, chosen.repeat)
    show_rounds(rounds)
    print(f"\nlarge: {MANY} clients...", flush=True)
    held = memory(rounds["large"], repeat=2)
    print(f"server memory, large: {held[str(CLIENTS)] / 1e6:.0f} MB with {CLIENTS} clients, ", end="")
    print(f"{held[str(MANY)] / 1e6:.0f} MB with {MANY} (x {held['ratio']:.2f})")
    results: dict[str, Any] = {"machine": machine(), "rounds": rounds, "memory": held}
    if not chosen.without_bytes:
        results["bytes"] = bytes_by_method.measure_all()
        bytes_by_method.show(results["bytes"])
    durable.write_text(chosen.out / "bench.json", json.dumps(results, indent=2) + "\n")
    print(f"\nwrote {chosen.out / 'bench.json'}")


if __name__ == "__main__":
    main()
