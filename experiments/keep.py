"""Copies the results of a study without its weights: what its report, `fedpeft compare` and the claims need.

    python experiments/keep.py OUT experiments/results/STUDY

OUT is the folder of `fedpeft study run`. Of a cell are kept cell.json and report.json, of its tickets the figures that
a report shows; records and adapters, which are large, can be had again to the bit by running the study.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

TICKET = ("client", "state", "reason", "examples", "weight", "update_norm")


def keep(out: Path, kept: Path) -> None:
    """Copies the results in `out` to the folder `kept`, which is made anew; says how many cells have none.

    Raises:
        FileNotFoundError: If `out` has no study.
        FileExistsError: If `kept` holds anything but results that were kept before.
    """
    cells = json.loads((out / "study.json").read_text(encoding="utf-8"))["cells"]  # first: what was kept may go then
    if kept.exists():
        if not (kept / "study.json").exists():
            raise FileExistsError(f"{kept} holds no results of a study and would be removed; name a folder in it")
        shutil.rmtree(kept)
    shutil.copytree(out / "report", kept / "report", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(out / "study.json", kept / "study.json")
    done = [row for row in cells if (out / "cells" / row["key"] / "report.json").exists()]
    if len(done) < len(cells):
        print(f"{len(cells) - len(done)} of {len(cells)} cells have no report and are left out", file=sys.stderr)
    for row in done:
        cell = out / "cells" / row["key"]
        place = kept / "cells" / row["key"]
        place.mkdir(parents=True)
        shutil.copy(cell / "cell.json", place / "cell.json")
        report = json.loads((cell / "report.json").read_text(encoding="utf-8"))
        for each in report["rounds"]:
            each["tickets"] = [_short(ticket) for ticket in each["tickets"]]
        (place / "report.json").write_text(json.dumps(report, ensure_ascii=False) + "\n", encoding="utf-8")


def _short(ticket: dict[str, Any]) -> dict[str, Any]:
    # Clients with noise of their own say no loss.
    losses = {key: value for key, value in ticket["metrics"].items() if key == "loss"}
    return {key: ticket[key] for key in TICKET} | {"metrics": losses}


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
