"""The outcome of a simulation as people read it."""

from __future__ import annotations

from pathlib import Path

from fedpeft import formatting
from fedpeft.api import views
from fedpeft.api.round_table import of_json
from fedpeft.process import output
from fedpeft_operator.cli.round_rows import say_rounds


def say_outcome(report: views.Json, out: Path) -> None:
    """Prints a report: state, bytes, clients, rounds, and what makes its accuracies too high."""
    tuned, model = report["adapter_parameters"], report["model_parameters"]
    output.say(
        f"{report['name']!r} is {report['state']}: {report['method']}, {tuned:,} parameters of {model:,} "
        f"({100 * tuned / model:.2f} %); bytes are those of the encoded tensors"
    )
    if report["partition"]:
        skew = report["partition"]["skew"]
        output.say(
            f"  {formatting.counted(skew['clients'], 'client')} ({report['partition']['variant']}): "
            f"{skew['smallest']:,} to {formatting.counted(skew['largest'], 'row')}, "
            f"label skew {skew['total_variation']:.3f}"
        )
    if "accuracy" in report["initial_metrics"]:
        output.say(f"  accuracy of version 0: {formatting.percent(report['initial_metrics']['accuracy'])}")
    if report["rounds"]:
        say_rounds(of_json(row, "payload") for row in report["rounds"])
    if report["overlap"]:
        _say_overlap(report["overlap"])
    output.say(f"results: {out / 'adapter.safetensors'}, {out / 'report.json'}, {out / 'records.jsonl'}")


def _say_overlap(found: views.Json) -> None:
    """Says that accuracies are too high, and which images were not compared."""
    from fedpeft.data.overlap import Overlap

    shared = Overlap.of_dict(found)
    if shared.images:
        output.say(
            f"{shared.images:,} of {formatting.counted(shared.held_out, 'held-out image')} "
            f"{'is a training image' if shared.images == 1 else 'are training images'} too: these accuracies are too "
            "high; report.json names some"
        )
    if shared.not_compared:
        output.say(f"training and held-out images: {shared.not_compared}")
