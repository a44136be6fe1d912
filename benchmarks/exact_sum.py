"""Exact sums beside the fold in float64: GB of float32 a second, and bytes of a sum.

    python benchmarks/exact_sum.py [--values 1000000] [--clients 8] [--repeat 5] [--out FILE.json]

Both fold the same updates into the same version by `fedpeft.rounds.folding.fold`, in this process, by turns; a figure
is the best of its repetitions. The bound is what NumPy takes for a multiplication and an addition of as many values.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.codecs import BLOCK_ELEMENTS
from fedpeft.codecs.sum128 import SUM128
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold_sums, fold_tensors


def best_of(repeat: int, works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Returns the least seconds of each piece of work, done by turns."""
    found = dict.fromkeys(works, float("inf"))
    for _ in range(repeat):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            found[name] = min(found[name], time.perf_counter() - began)
    return found


def main() -> None:
    """Measures, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    spec = AdapterSpec.of("bias", [TensorSpec("x", (given.values,))])
    rule, rng = strategy("fedavg", {}), np.random.default_rng(0)
    contributions = []
    for client in range(given.clients):
        values = (1e-3 * rng.standard_normal(given.values)).astype(np.float32)
        manifest, data = payload.encode({"x": values}, spec.shared, "float32")
        contributions.append(Contribution(f"c{client}", UpdateFacts(100 + client), manifest, memoryview(data)))
    base = {"x": np.zeros(given.values, np.float32)}
    arrays = [np.frombuffer(c.payload, np.float32) for c in contributions]
    total, product = np.zeros((2, BLOCK_ELEMENTS))

    def bound() -> None:
        for start in range(0, given.values - BLOCK_ELEMENTS + 1, BLOCK_ELEMENTS):
            for array in arrays:
                np.copyto(product, array[start : start + BLOCK_ELEMENTS])
                np.multiply(product, 100.0, out=product)
                np.add(total, product, out=total)

    seconds = best_of(
        given.repeat,
        {
            "multiply and add": bound,
            "fold in float64": lambda: list(fold_tensors(contributions, spec.shared, rule, base, {})),
            "fold, exact": lambda: list(fold_tensors(contributions, spec.shared, rule, base, {}, exact=True)),
            "sum for a parent": lambda: sum(map(len, fold_sums(contributions, spec.shared, rule))),
        },
    )
    read = 4 * given.values * given.clients
    rows = {name: {"gb_per_second": read / taken / 1e9, "seconds": taken} for name, taken in seconds.items()}
    print(f"{given.clients} updates of {given.values:,} values, {read / 1e6:.0f} MB in all")
    for name, row in rows.items():
        print(f"{name:18} {row['gb_per_second']:6.2f} GB/s")
    print(
        f"a sum has {SUM128.length_bounds(given.values)[0] / given.values:.0f} bytes a value, of any number of updates"
    )
    if given.out:
        given.out.write_text(json.dumps({"clients": given.clients, "values": given.values, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
