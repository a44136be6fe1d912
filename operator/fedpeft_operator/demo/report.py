"""Results of a demo: `report.json`, the chart of accuracy against bytes, and a summary in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.api.following import RunSnapshot
from fedpeft.errors import StateInvalid
from fedpeft.process import durable

SUMMED = (
    "wire_bytes_up",
    "wire_bytes_down",
    "payload_bytes_up",
    "payload_bytes_down",
    "four_bytes_a_parameter",
    "full_bytes_each_way",
)
"""Figures of rounds whose sums are a run's."""


def report_of(snapshot: RunSnapshot, clients: Mapping[str, int], seconds: float) -> views.Json:
    """Returns the report of a run.

    Args:
        snapshot: The run, every round of it.
        clients: Training examples by client.
        seconds: From the demo's start to the run's end, set-up included.
    """
    run = snapshot.run
    tuned = views.adapter_parameters(run.spec)
    rounds = [_round(views.round_json(r, run), tuned) for r in snapshot.committed]
    last = rounds[-1]["accuracy"] if rounds else None
    return {
        "run": run.id,
        "name": run.config.name,
        "state": views.state(run),
        "model": run.config.model.name,
        "method": run.spec.method,
        "model_parameters": run.model_parameters,
        "adapter_parameters": tuned,
        "classes": list(run.config.model.classes),
        "chance": 1 / max(1, len(run.config.model.classes)),
        "clients": dict(clients),
        "initial": dict(sorted(run.initial_metrics.items())),
        "rounds": rounds,
        "accuracy": last,
        "totals": _totals(rounds),
        "seconds": round(seconds, 1),
    }


def _round(row: views.Json, tuned: int) -> views.Json:
    clients = len(row["clients"])
    return {
        "version": row["version"],
        "clients": row["clients"],
        "accuracy": row["metrics"].get("accuracy"),
        "loss": row["metrics"].get("loss"),
        "train_loss": row["metrics"].get("train_loss"),
        "wire_bytes_up": row["wire_bytes_up"],
        "wire_bytes_down": row["wire_bytes_down"],
        "payload_bytes_up": row["payload_bytes_up"],
        "payload_bytes_down": row["payload_bytes_down"],
        "four_bytes_a_parameter": tuned * views.BYTES_PER_PARAMETER * clients,
        "full_bytes_each_way": row["full_bytes_each_way"],
        "seconds": row["seconds"],
        "metrics": row["metrics"],
    }


def _totals(rounds: list[views.Json]) -> views.Json:
    totals: views.Json = {name: sum(row[name] for row in rounds) for name in SUMMED}
    up, full = totals["wire_bytes_up"], totals["full_bytes_each_way"]
    return {
        **totals,
        "full_over_wire_up": round(full / up, 1) if up and full else None,
        "wire_up_over_payload_up": round(up / totals["payload_bytes_up"], 4) if totals["payload_bytes_up"] else None,
        "round_seconds": round(sum(row["seconds"] or 0 for row in rounds), 1),
    }


def write_json(report: views.Json, path: Path) -> None:
    """Writes a report.

    Raises:
        StateInvalid: If the file cannot be written.
    """
    try:
        durable.write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StateInvalid(f"cannot write {path}: {error.strerror}") from None


def curve(report: views.Json) -> tuple[list[float], list[float]]:
    """Returns (MiB sent up and down so far, accuracy) of every version that was scored, version 0 first."""
    sent, points = 0.0, []
    if "accuracy" in report["initial"]:
        points.append((0.0, report["initial"]["accuracy"]))
    for row in report["rounds"]:
        sent += (row["wire_bytes_up"] + row["wire_bytes_down"]) / formatting.MIB
        if row["accuracy"] is not None:
            points.append((sent, row["accuracy"]))
    return [x for x, _ in points], [y for _, y in points]


def write_png(report: views.Json, path: Path) -> None:
    """Draws accuracy against all bytes sent, and says what full fine-tuning would have sent.

    Raises:
        StateInvalid: If the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sent, accuracy = curve(report)
    totals, clients = report["totals"], len(report["clients"])
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(sent, [100 * a for a in accuracy], marker="o", color="tab:blue")
    if accuracy:
        label = f"{100 * accuracy[-1]:.1f} %"
        axes.annotate(label, (sent[-1], 100 * accuracy[-1]), (0, 8), textcoords="offset points", ha="center")
    chance = 100 * report["chance"]
    axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        f"chance, {chance:.0f} %", (1, chance), (-4, 4), ("axes fraction", "data"), "offset points", ha="right"
    )
    axes.set_xlabel("sent so far, up and down, all clients (MiB on the wire)")
    axes.set_ylabel("accuracy on held-out images (%)")
    axes.set_ylim(0, 100)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    rounds = formatting.counted(len(report["rounds"]), "round")
    axes.set_title(
        f"{report['method']} tuning of {report['model']}, {formatting.counted(clients, 'client')}, {rounds}\n"
        f"{report['adapter_parameters']:,} of {report['model_parameters']:,} parameters"
    )
    both = totals["wire_bytes_up"] + totals["wire_bytes_down"]
    full = 2 * totals["full_bytes_each_way"]
    figure.supxlabel(
        f"Full fine-tuning would have sent {formatting.size(full)} in these rounds, "
        f"{formatting.as_much(full / max(1, both))}: far beyond the right edge.",
        fontsize=9,
    )
    try:
        with durable.writing(path) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        raise StateInvalid(f"cannot write {path}: {error.strerror}") from None


def summary(report: views.Json) -> list[str]:
    """Returns what is said at the end."""
    totals = report["totals"]
    start, end = report["initial"].get("accuracy"), report["accuracy"]
    begun = f"from {formatting.percent(start)} " if start is not None else ""
    rounds = formatting.counted(len(report["rounds"]), "round")
    lines = [
        f"accuracy on held-out images: {begun}to {formatting.percent(end)} in {rounds} "
        f"(chance is {formatting.percent(report['chance'])})",
        f"sent up: {formatting.size(totals['wire_bytes_up'])} on the wire, of it "
        f"{formatting.size(totals['payload_bytes_up'])} tensors; "
        f"4 bytes a parameter would be {formatting.size(totals['four_bytes_a_parameter'])}",
        f"sent down: {formatting.size(totals['wire_bytes_down'])} on the wire, of it "
        f"{formatting.size(totals['payload_bytes_down'])} tensors",
    ]
    up, full = totals["wire_bytes_up"], totals["full_bytes_each_way"]
    if up and full:  # the quotient itself: the report's is rounded, and rounding it again may say 376 for 376.52
        lines.append(
            f"full fine-tuning would have sent {formatting.size(full)} each way, {formatting.as_much(full / up)}"
        )
    lines.append(f"rounds took {totals['round_seconds']:.0f} s, all of it {report['seconds']:.0f} s")
    return lines
