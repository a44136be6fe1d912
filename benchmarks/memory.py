"""Memory of the server against the number of clients of a round, with a plot.

    python benchmarks/memory.py [--small 8 64 250 1000] [--large 8 64 250] [--plot memory.svg]

For each number of clients a daemon of its own holds two rounds of `benchmarks/round.py`; its peak is the kernel's
`VmHWM`. *Of all updates* is what it would have if it held all updates of a round at once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl
import round as one_round
from workload import payload_bytes

MEGABYTE = 1e6


def measured(payload: str, clients: int) -> tuple[float, float, float]:
    """Returns the server's peak and its memory when idle, in MB, and the seconds of a round."""
    found = one_round.measure(payload, clients, repeat=1)
    return found["server_peak_bytes"] / MEGABYTE, found["server_idle_bytes"] / MEGABYTE, found["round_s"]


def plot(rows: dict[str, list[tuple[int, float, float, float]]], path: Path) -> None:
    """Draws the peaks, and what all updates of a round take, over the number of clients."""
    mpl.use("svg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for payload, found in rows.items():
        clients = [row[0] for row in found]
        megabytes = payload_bytes(payload) / MEGABYTE
        (line,) = axes.plot(
            clients, [row[1] for row in found], marker="o", label=f"server, updates of {megabytes:.3g} MB"
        )
        axes.plot(
            clients,
            [n * megabytes for n in clients],
            ":",
            color=line.get_color(),
            label=f"all updates of a round, of {megabytes:.3g} MB",
        )
    axes.set(xscale="log", yscale="log", xlabel="clients of a round", ylabel="memory, MB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Prints a table, and draws the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", nargs="+", type=int, default=[8, 64, 250, 1000])
    parser.add_argument("--large", nargs="+", type=int, default=[8, 64, 250])
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    print("| payload, MB | clients | of all updates, MB | server's peak, MB | when idle, MB | a round, s |")
    print("|--:|--:|--:|--:|--:|--:|", flush=True)
    rows: dict[str, list[tuple[int, float, float, float]]] = {"small": [], "large": []}
    for payload, each in (("small", chosen.small), ("large", chosen.large)):
        for clients in each:
            peak, idle, seconds = measured(payload, clients)
            rows[payload].append((clients, peak, idle, seconds))
            size = payload_bytes(payload) / MEGABYTE
            figures = f"{size * clients:.0f} | {peak:.0f} | {idle:.0f} | {seconds:.2f}"
            print(f"| {size:.2f} | {clients} | {figures} |", flush=True)
    if chosen.plot:
        plot(rows, chosen.plot)


if __name__ == "__main__":
    main()
