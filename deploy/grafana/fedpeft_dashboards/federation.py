"""The *federation* dashboard: how the runs learn, and what their rounds wait for."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.models import units

from fedpeft_dashboards.panels import GREEN, RED, RUNS, YELLOW, Query, board, lines, numbers, once, rows, states


def federation() -> Dashboard:
    """Returns the dashboard."""
    made = board("fedpeft-federation", "FedPEFT: federation", "How the runs learn and what they wait for", of_runs=True)
    for part in (_runs, _learning, _in_progress, _held, _measured):
        part(made)
    return made


def _runs(to: Dashboard) -> None:
    to.with_row(Row("Runs"))
    to.with_panel(
        numbers(
            "Runs by state",
            "A paused run opens no round until somebody resumes it: fedpeft run resume ID.",
            units.NoUnit,
            Query(f"sum by (state) ({once('run, state', 'fedpeft_run_state')})", "{{state}}"),
            width=16,
        )
    ).with_panel(
        numbers(
            "Alerts",
            "Alerts that fire now; docs/runbook.md has a chapter on each.",
            units.NoUnit,
            Query('sum(ALERTS{job="fedpeft", alertstate="firing"}) or vector(0)', "firing"),
            (None, GREEN),
            (1, RED),
            width=8,
        )
    )
    info = "on (job, instance, run) group_left (name, method, model) fedpeft_run_info"
    to.with_panel(
        rows(
            "Runs",
            "What each run tunes, and the round it is in.",
            Query(f"max by (run, name, method, model) (fedpeft_round{{{RUNS}}} * {info})", ""),
            (("run", "Run"), ("name", "Name"), ("method", "Method"), ("model", "Model"), ("Value", "Round")),
        )
    )


def _learning(to: Dashboard) -> None:
    to.with_row(Row("Learning"))
    to.with_panel(
        lines(
            "Accuracy",
            "Of the version scored last, by the evaluators' splits.",
            units.PercentUnit,
            Query(once("run, split", "fedpeft_accuracy"), "{{run}} {{split}}"),
            steps=True,
        )
    ).with_panel(
        lines(
            "Loss",
            "Mean loss in nats: of the version scored last, and (split train) as the clients of the last round saw it.",
            units.NoUnit,
            Query(once("run, split", "fedpeft_loss"), "{{run}} {{split}}"),
            steps=True,
        )
    )


def _in_progress(to: Dashboard) -> None:
    to.with_row(Row("Round in progress"))
    to.with_panel(
        states(
            "Phase",
            "waiting: too few clients are there. open: clients train. aggregating: the server folds.",
            Query(f"{once('run, phase', 'fedpeft_round_phase')} == 1", "{{run}} {{phase}}"),
        )
    ).with_panel(
        lines(
            "Updates",
            "Received, against the quorum that suffices at the deadline and the goal that closes the round at once.",
            units.NoUnit,
            Query(once("run", "fedpeft_clients", 'state="received"'), "{{run}} received"),
            Query(once("run", "fedpeft_round_quorum"), "{{run}} quorum"),
            Query(once("run", "fedpeft_round_goal"), "{{run}} goal"),
            steps=True,
        )
    )
    to.with_panel(
        lines(
            "Time used",
            "Share of the time until the deadline; whoever is awaited after 80 % is a straggler.",
            units.PercentUnit,
            Query(once("run", "run:fedpeft_round_time:used_ratio"), "{{run}}"),
            width=8,
            limit=0.8,
        )
    ).with_panel(
        lines(
            "Awaited",
            "Clients that hold a ticket and have not sent their update.",
            units.NoUnit,
            Query(once("run", "fedpeft_clients", 'state="issued"'), "{{run}}"),
            width=8,
            steps=True,
        )
    ).with_panel(
        lines(
            "Ready for the next round",
            "Clients that wait to be sampled, against what a round needs to open; those that declined the run.",
            units.NoUnit,
            Query(once("run", "fedpeft_clients", 'state="waiting"'), "{{run}} waiting"),
            Query(once("run", "fedpeft_clients", 'state="declined"'), "{{run}} declined"),
            Query(once("run", "fedpeft_round_available"), "{{run}} needed"),
            width=8,
            steps=True,
        )
    )


def _held(to: Dashboard) -> None:
    to.with_row(Row("Rounds held"))
    to.with_panel(
        numbers(
            "Round",
            "Number of the round in progress.",
            units.NoUnit,
            Query(once("run", "fedpeft_round"), "{{run}}"),
        )
    ).with_panel(
        numbers(
            "Extensions",
            "Deadlines that the round in progress passed without a quorum.",
            units.NoUnit,
            Query(once("run", "fedpeft_round_extensions"), "{{run}}"),
            (None, GREEN),
            (1, YELLOW),
            (3, RED),
        )
    ).with_panel(
        numbers(
            "Rounds by outcome",
            "Since the daemon began. extended: the deadline passed without a quorum; paused: and the run with it.",
            units.NoUnit,
            Query(f"sum by (outcome) (fedpeft_rounds_total{{{RUNS}}})", "{{outcome}}"),
            width=12,
        )
    )


def _measured(to: Dashboard) -> None:
    """Adds what was measured of the rounds held, below their numbers."""
    to.with_panel(
        lines(
            "Duration of the phases",
            "In the last hour: how long rounds were open, how long they were folded.",
            units.Seconds,
            *_quantiles("fedpeft_round_seconds", "phase"),
            Query(f"avg by (phase) (run_phase:fedpeft_round_seconds:mean1h{{{RUNS}}})", "{{phase}} mean"),
            width=8,
        )
    ).with_panel(
        lines(
            "Updates by what became of them",
            "In the last hour. refused: something is wrong with a client; late: it was too slow, and keeps the update.",
            units.NoUnit,
            Query(f"sum by (run, outcome) (increase(fedpeft_updates_total{{{RUNS}}}[1h]))", "{{run}} {{outcome}}"),
            width=8,
        )
    ).with_panel(
        lines(
            "Norm of updates",
            "Euclidean, in the last hour: a jump is too large a learning rate, or a client unlike the others.",
            units.NoUnit,
            *_quantiles("fedpeft_update_norm", "run"),
            width=8,
        )
    ).with_panel(
        lines(
            "Privacy budget spent",
            "Epsilon of the committed rounds, at the run's delta; of runs with noise at the server or at the clients.",
            units.NoUnit,
            Query(once("run", "fedpeft_privacy_epsilon"), "{{run}}"),
            steps=True,
            width=12,
        )
    ).with_panel(
        lines(
            "Staleness of updates",
            "Versions made since the one that an update started from, in the last hour; only of buffered rounds.",
            units.NoUnit,
            *_quantiles("fedpeft_update_staleness", "run"),
            width=12,
        )
    )


def _quantiles(histogram: str, label: str) -> list[Query]:
    """Returns the median and the 95 % quantile of a histogram in the last hour, for each value of a label."""
    rate = f"sum by ({label}, le) (rate({histogram}_bucket{{{RUNS}}}[1h]))"
    return [
        Query(f"histogram_quantile({q}, {rate})", f"{{{{{label}}}}} {name}")
        for q, name in ((0.5, "median"), (0.95, "95 %"))
    ]
