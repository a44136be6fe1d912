"""The *clients and bytes* dashboard: who is there, how fast they are, and what travels against what should."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.models import units

from fedpeft_dashboards.panels import DAEMONS, GREEN, RED, RUNS, YELLOW, Query, board, lines, numbers, once

QUANTILES = ((0.05, "slowest 5 %"), (0.5, "median"), (0.95, "fastest 5 %"))


def clients_and_bytes() -> Dashboard:
    """Returns the dashboard."""
    what = "Who is there, how fast they are, and what travels against what should"
    made = board("fedpeft-clients-and-bytes", "FedPEFT: clients and bytes", what, of_runs=True)
    for part in (_clients, _speed, _sums, _rounds, _traffic):
        part(made)
    return made


def _clients(to: Dashboard) -> None:
    to.with_row(Row("Clients"))
    to.with_panel(
        lines(
            "Registered clients",
            "present: called within 2 minutes; silent: within a day; gone: not for a day. Names: fedpeft client list.",
            units.NoUnit,
            Query(f"max by (role, state) (fedpeft_registered_clients{{{DAEMONS}}})", "{{role}} {{state}}"),
            stacked=True,
            steps=True,
        )
    ).with_panel(
        lines(
            "What they are doing",
            "Waiting to be sampled, or their tickets in the round in progress.",
            units.NoUnit,
            Query(f"sum by (state) ({once('run, state', 'fedpeft_clients')})", "{{state}}"),
            stacked=True,
            steps=True,
        )
    )


def _speed(to: Dashboard) -> None:
    to.with_row(Row("As updates say"))
    to.with_panel(
        lines(
            "Images a second",
            "Trained on by a client, in the last hour. The slowest decide how long a round takes.",
            units.NoUnit,
            *(_quantile("fedpeft_client_images_per_second_bucket", q, name) for q, name in QUANTILES),
        )
    ).with_panel(
        lines(
            "GPU memory",
            "Most that a training took, in the last hour; nothing from clients without a GPU.",
            units.BytesIEC,
            _quantile("fedpeft_client_gpu_memory_bytes_bucket", 0.5, "median"),
            _quantile("fedpeft_client_gpu_memory_bytes_bucket", 0.95, "95 %"),
        )
    )


def _quantile(buckets: str, q: float, name: str) -> Query:
    expr = f"histogram_quantile({q}, sum by (run, le) (rate({buckets}{{{RUNS}}}[1h])))"
    return Query(expr, f"{{{{run}}}} {name}")


def _sums(to: Dashboard) -> None:
    to.with_row(Row("Bytes: sums"))
    wire = f"fedpeft_wire_bytes_total{{{RUNS}}}"
    to.with_panel(
        numbers(
            "On the wire",
            "Whole messages, since the daemon began.",
            units.BytesIEC,
            Query(f"sum by (direction) ({wire})", "{{direction}}"),
        )
    ).with_panel(
        numbers(
            "Tensors",
            "The encoded tensors in them, by encoding.",
            units.BytesIEC,
            Query(
                f"sum by (direction, encoding) (fedpeft_payload_bytes_total{{{RUNS}}})", "{{direction}} {{encoding}}"
            ),
        )
    ).with_panel(
        numbers(
            "Wire over tensors",
            "What the messages around the tensors cost: 1.05 is usual for small adapters, less for large ones.",
            units.NoUnit,
            Query(
                f"sum by (direction) ({wire}) / sum by (direction) (fedpeft_payload_bytes_total{{{RUNS}}})",
                "{{direction}}",
            ),
        )
    ).with_panel(
        numbers(
            "Full fine-tuning",
            "How many times as much the last round would have sent.",
            units.NoUnit,
            Query(
                f"{once('run', 'fedpeft_full_finetuning_bytes')} / ignoring (direction) group_right () "
                f"({once('run, direction', 'fedpeft_last_round_bytes')} > 0)",
                "{{run}} {{direction}}",
            ),
        )
    )


def _rounds(to: Dashboard) -> None:
    to.with_row(Row("Bytes: rounds"))
    to.with_panel(
        lines(
            "Bytes of a round",
            "Of the round in progress, and the budget: 4 bytes a parameter sent, for each client sampled.",
            units.BytesIEC,
            Query(once("run, direction", "fedpeft_round_bytes"), "{{run}} {{direction}}"),
            Query(once("run, direction", "fedpeft_last_round_bytes"), "{{run}} {{direction}}, last round"),
            Query(once("run, direction", "fedpeft_round_budget_bytes"), "{{run}} {{direction}}, budget"),
            steps=True,
        )
    ).with_panel(
        lines(
            "Share of the budget",
            "A little above 1 is usual without an encoding; above 1.5 uploads or downloads are repeated.",
            units.PercentUnit,
            Query(once("run, direction", "run_direction:fedpeft_round_bytes:budget_ratio"), "{{run}} {{direction}}"),
            Query(
                once("run, direction", "run_direction:fedpeft_last_round_bytes:budget_ratio"),
                "{{run}} {{direction}}, last round",
            ),
            limit=1.5,
            steps=True,
        )
    )


def _traffic(to: Dashboard) -> None:
    to.with_row(Row("Bytes: traffic"))
    to.with_panel(
        lines(
            "On the wire",
            "Whole messages; up is to the server.",
            units.BytesPerSecondIEC,
            Query(f"sum by (direction) (rate(fedpeft_wire_bytes_total{{{RUNS}}}[$__rate_interval]))", "{{direction}}"),
        )
    ).with_panel(
        lines(
            "Tensors",
            "Encoded tensors, by encoding.",
            units.BytesPerSecondIEC,
            Query(
                f"sum by (direction, encoding) (rate(fedpeft_payload_bytes_total{{{RUNS}}}[$__rate_interval]))",
                "{{direction}} {{encoding}}",
            ),
        )
    )
    to.with_panel(
        numbers(
            "Beyond the budget",
            "Bytes of the dearer of the round in progress and the last one, less the budget; below 0 is within it.",
            units.BytesIEC,
            Query(once("run, direction", "run_direction:fedpeft_round_bytes:beyond_budget"), "{{run}} {{direction}}"),
            (None, GREEN),
            (2**20, YELLOW),
            (2**30, RED),
            width=24,
        )
    )
