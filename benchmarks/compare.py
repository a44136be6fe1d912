"""`make bench-compare`: what `make bench` measured, beside the figures that were kept, and what got worse.

Compared are ratios to something measured in the same run, bytes, and memory: times of one machine say nothing on
another. A figure is worse if it is larger by more than a tenth. Exit code 1 if one is; `--keep` writes the new ones in
their place.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workload import HERE

from fedpeft.process import durable

KEPT = HERE / "kept.json"
WORSE = 1.10
"""A figure that grew by more than this factor got worse."""
_OF_ROUNDS = ("round_over_bare", "tls_over_plain", "processor_over_bare", "server_peak_bytes")
_BYTES = ("wire_over_payload_up", "wire_over_payload_down")


def figures(results: dict[str, Any]) -> dict[str, float]:
    """Returns the figures of a `bench.json` that mean something on other machines, by name; less is better."""
    found = {f"{payload}: {key}": row[key] for payload, row in results["rounds"].items() for key in _OF_ROUNDS}
    # What comes on top of the payload: the payload itself would hide any change of it.
    found |= {f"{payload}: {key} - 1": row[key] - 1 for payload, row in results["rounds"].items() for key in _BYTES}
    found["large: memory, many clients / few"] = results["memory"]["ratio"]
    return found


def compared(kept: dict[str, float], now: dict[str, float]) -> Iterator[tuple[str, float | None, float | None, str]]:
    """Yields each figure's name, the kept value, the new one, and a word on them."""
    for name in sorted(kept.keys() | now.keys()):
        before, after = kept.get(name), now.get(name)
        if before is None or after is None:
            yield name, before, after, "new" if before is None else "no longer measured"
            continue
        ratio = after / before
        yield name, before, after, f"x {ratio:.2f}" + (", WORSE" if ratio > WORSE else "")


def main() -> int:
    """Prints the table; returns 1 if a figure got worse, or is no longer measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measured", type=Path, help="bench.json of `make bench`")
    parser.add_argument("--keep", action="store_true", help="keep these figures, in benchmarks/kept.json")
    chosen = parser.parse_args()
    results = json.loads(chosen.measured.read_text(encoding="utf-8"))
    now = figures(results)
    if chosen.keep:
        durable.write_text(KEPT, json.dumps({"machine": results["machine"], "figures": now}, indent=2) + "\n")
        print(f"kept {len(now)} figures in {KEPT}")
        return 0
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    print(f"kept on: {kept['machine']['cpu']}; now on: {results['machine']['cpu']}")
    rows = list(compared(kept["figures"], now))
    for name, before, after, word in rows:
        shown = "".join("             -" if value is None else f"{value:14,.4f}" for value in (before, after))
        print(f"{name:40}{shown}   {word}")
    return int(any("WORSE" in word or "no longer" in word for *_, word in rows))


if __name__ == "__main__":
    sys.exit(main())
