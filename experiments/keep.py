"""Copies the results of a study without its weights: what its report, `fedpeft compare` and the claims need.

    python experiments/keep.py OUT experiments/results/STUDY

OUT is the folder of `fedpeft study run`. Of a cell are kept cell.json and report.json, of its tickets the figures that
a report shows; records and adapters, which are large, can be had again to the bit by running the study.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

TICKET = ("client", "state", "reason", "examples", "weight", "update_norm")


def keep(out: Path, kept: Path) -> None:
    """Copies the results in `out` to the folder `kept`, which is made anew; says how many cells have none.

    Raises:
        FileNotFoundError: If `out` has no study.
        FileExistsError: If `kept` holds anything but results that were kept before.
    """
    keys = [row["key"] for row in json.loads((out / "study.json").read_text(encoding="utf-8"))["cells"]]
    if kept.exists():
        _check_kept(kept)
    done = sorted({key for key in keys if (out / "cells" / key / "report.json").exists()})
    if missing := len(set(keys)) - len(done):
        print(f"{missing} of {len(set(keys))} cells have no report and are left out", file=sys.stderr)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=f"{kept.name}.") as scratch:
        made = Path(scratch) / "made"
        _copy(out, made, done)
        if kept.exists():  # only now: what was kept is there until all that replaces it is
            kept.rename(Path(scratch) / "before")
        made.rename(kept)


def _check_kept(folder: Path) -> None:
    """Refuses a folder of anything but results that `keep` left: it would be removed."""
    if not (folder / "study.json").exists():
        raise FileExistsError(f"{folder} holds no results of a study and would be removed; name a folder in it")
    for name in ("adapter.safetensors", "records.jsonl"):
        if found := next(folder.glob(f"cells/*/{name}"), None):
            raise FileExistsError(f"{found} would be removed: {folder} is where a study ran; name another folder")


def _copy(out: Path, kept: Path, keys: list[str]) -> None:
    shutil.copytree(out / "report", kept / "report", ignore=shutil.ignore_patterns("*.png"))
    shutil.copy(out / "study.json", kept / "study.json")
    for key in keys:
        cell, place = out / "cells" / key, kept / "cells" / key
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
