"""The plan of a study as a table: a row for each combination of points, and the sums."""

from __future__ import annotations

from collections.abc import Sequence

from fedpeft import formatting
from fedpeft.process import output
from fedpeft.studies.plan import CellPlan


def say_plan(name: str, planned: Sequence[CellPlan], jobs: int, *, as_json: bool) -> None:
    """Prints a plan."""
    todo = [each for each in planned if not each.done]
    seconds = sum(each.seconds for each in todo) / max(1, min(jobs, len(todo)))
    if as_json:
        output.say_json(
            {
                "name": name,
                "cells": [_row(each) for each in planned],
                "cells_to_run": len(todo),
                "jobs": jobs,
                "seconds": round(seconds, 1),
            }
        )
        return
    groups: dict[tuple[str, ...], list[CellPlan]] = {}
    for each in planned:
        groups.setdefault(tuple(each.cell.points.values()), []).append(each)
    axes = list(planned[0].cell.points)
    columns = [*(axis.upper() for axis in axes), "CELLS", "UP", "DOWN", "A CELL"]
    rows = [
        (
            *points,
            len(of),
            formatting.size(sum(each.bytes_up for each in of)),
            formatting.size(sum(each.bytes_down for each in of)),
            formatting.duration(sum(each.seconds for each in of) / len(of)),
        )
        for points, of in groups.items()
    ]
    output.say_table(columns, rows, right=("CELLS", "UP", "DOWN", "A CELL"))
    up, down = (formatting.size(sum(getattr(each, side) for each in planned)) for side in ("bytes_up", "bytes_down"))
    there = len(planned) - len(todo)
    before = f", {there} of them with results already" if there else ""
    output.say(f"{name!r}: {formatting.counted(len(planned), 'cell')}{before}; {up} up, {down} down")
    output.say(f"about {formatting.duration(seconds)} with {formatting.counted(jobs, 'cell')} at once")


def _row(each: CellPlan) -> dict[str, object]:
    return {
        "points": dict(each.cell.points),
        "seed": each.cell.seed,
        "done": each.done,
        "seconds": round(each.seconds, 1),
        "payload_bytes_up": each.bytes_up,
        "payload_bytes_down": each.bytes_down,
    }
