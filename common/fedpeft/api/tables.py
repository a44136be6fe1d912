"""Runs and rounds as tables of HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable

from fedpeft.api import round_table, views
from fedpeft.api.following import RunSnapshot
from fedpeft.api.narration import headline
from fedpeft.formatting import percent, size
from fedpeft.frames import table_html
from fedpeft.v1 import run_pb2


def runs_html(address: str, runs: Iterable[run_pb2.Run]) -> str:
    """Returns all runs of a server."""
    rows = [
        (r.id, r.config.name, f"{r.spec.method} on {r.config.model.name}", views.state(r), _progress(r)) for r in runs
    ]
    return table_html(f"FedPEFT server {address}", ("run", "name", "what", "state", "version"), rows)


def rounds_html(snapshot: RunSnapshot) -> str:
    """Returns a run with its committed rounds, and the one in progress."""
    run = snapshot.run
    rows: list[tuple[str, ...]] = []
    if "accuracy" in run.initial_metrics:
        rows.append(("0", "", percent(run.initial_metrics["accuracy"]), "", "", "", "", "", ""))
    for each in snapshot.committed:
        rows.append(round_table.of_message(each, run).cells())
    if (current := snapshot.current) is not None:
        done = f"{len(views.counted(current))} of {views.goal(current, run)}"
        up, down = size(current.wire_bytes_up), size(current.wire_bytes_down)
        rows.append((f"{current.number}, {views.phase(current)}", done, "", "", "", up, down, "", ""))
    state = views.state(run) + (f": {run.reason}" if run.reason else "")
    return table_html(f"{headline(run)}; {state}", round_table.COLUMNS, rows)


def _progress(run: run_pb2.Run) -> str:
    return f"{run.version} of {run.config.rounds.count}"
