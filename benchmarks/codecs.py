"""Time and bytes of every encoding: 1 M values encoded, checked and decoded, as ratios to float32's.

    python benchmarks/codecs.py [--values N] [--repeat R]

The values are normal numbers, of which sparse encodings get a tenth. Each figure is the least processor time of the
repetitions; float32 is next to free (a copy, a look at the exponents, a copy): a third of a millisecond for all three.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from fedpeft.codecs import Values, codecs

STEPS = ("encode", "check", "decode")


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Returns the least time of some repetitions."""
    found = []
    for _ in range(repeat):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def measure(name: str, values: Values, repeat: int) -> tuple[int, list[float]]:
    """Returns the bytes of the values in an encoding, and the seconds of each step."""
    codec = codecs.get(name).seeded(1)
    if codec.is_sparse:
        values = np.where(np.abs(values) > 1.645, values, np.float32(0))
    data = memoryview(codec.encode(values))
    steps = (
        lambda: codec.encode(values),
        lambda: codec.check(data, values.size),
        lambda: codec.decode(data, values.size),
    )
    return len(data), [seconds(step, repeat) for step in steps]


def main() -> None:
    """Prints a row for each encoding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=7)
    given = parser.parse_args()
    values = np.random.default_rng(0).standard_normal(given.values).astype(np.float32)
    whole = sum(measure("float32", values, given.repeat)[1])
    print(f"float32: {1e3 * whole:.2f} ms for encode, check and decode together; the columns are multiples of that")
    print(f"{'encoding':<17}{'bits a value':>13}" + "".join(f"{step:>9}" for step in STEPS))
    for name in codecs.names():
        size, steps = measure(name, values, given.repeat)
        print(f"{name:<17}{8 * size / given.values:>13.2f}" + "".join(f"{step / whole:>9.1f}" for step in steps))


if __name__ == "__main__":
    main()
