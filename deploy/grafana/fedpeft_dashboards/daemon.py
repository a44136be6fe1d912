"""The *daemon* dashboard: whether the process is well, its disk, its certificates, its calls."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from grafana_foundation_sdk.models import units

from fedpeft_dashboards.panels import DAEMONS, GREEN, RED, YELLOW, Query, board, lines, numbers

DAY_S = 86_400


def daemon() -> Dashboard:
    """Returns the dashboard."""
    what = "Whether the process is well, its disk, its certificates, its calls"
    made = board("fedpeft-daemon", "FedPEFT: daemon", what, of_runs=False)
    for part in (_life, _disk, _process, _calls, _bounds, _evaluation):
        part(made)
    return made


def _life(to: Dashboard) -> None:
    to.with_row(Row("Life"))
    up = Query(f"up{{{DAEMONS}}}", "{{instance}}")
    to.with_panel(
        numbers("Up", "1 if the metrics could be had.", units.NoUnit, up, (None, RED), (1, GREEN))
    ).with_panel(
        numbers("Version", "What runs where.", units.NoUnit, Query(f"fedpeft_build{{{DAEMONS}}}", "{{version}}"))
    ).with_panel(
        numbers(
            "Up for",
            "Since the process began.",
            units.DurationSeconds,
            Query(f"time() - process_start_time_seconds{{{DAEMONS}}}", "{{instance}}"),
        )
    ).with_panel(
        numbers(
            "Alerts",
            "Alerts that fire now; docs/runbook.md has a chapter on each.",
            units.NoUnit,
            Query('sum(ALERTS{job="fedpeft", alertstate="firing"}) or vector(0)', "firing"),
            (None, GREEN),
            (1, RED),
        )
    )


def _disk(to: Dashboard) -> None:
    to.with_row(Row("Disk and certificates"))
    to.with_panel(
        numbers(
            "Disk free",
            "Of each file system that the daemon writes to; below 5 % rounds are about to stop.",
            units.PercentUnit,
            Query(f"instance:fedpeft_disk_free_bytes:ratio{{{DAEMONS}}}", "{{instance}} {{place}}"),
            (None, RED),
            (0.05, YELLOW),
            (0.2, GREEN),
        )
    ).with_panel(
        numbers(
            "Certificates end in",
            "Nothing where the daemon serves plain text.",
            units.DurationSeconds,
            Query(f"certificate:fedpeft_certificate:seconds_left{{{DAEMONS}}}", "{{instance}} {{certificate}}"),
            (None, RED),
            (2 * DAY_S, YELLOW),
            (14 * DAY_S, GREEN),
            width=18,
        )
    )
    to.with_panel(
        lines(
            "Disk",
            "Free bytes, and in a day if it goes on as in the last 6 hours; below `spared` no upload is taken.",
            units.BytesIEC,
            Query(f"fedpeft_disk_free_bytes{{{DAEMONS}}}", "{{instance}} {{place}} free"),
            Query(f"instance:fedpeft_disk_free_bytes:predicted1d{{{DAEMONS}}}", "{{instance}} {{place}} in a day"),
            Query(f"fedpeft_disk_size_bytes{{{DAEMONS}}}", "{{instance}} {{place}} size"),
            Query(f"fedpeft_disk_spared_bytes{{{DAEMONS}}}", "{{instance}} {{place}} spared"),
            width=12,
        )
    ).with_panel(
        lines(
            "Stored",
            "Files of the data folder: uploads, encoded versions, copies of what a bucket holds, the database.",
            units.BytesIEC,
            Query(f"fedpeft_stored_bytes{{{DAEMONS}}}", "{{instance}} {{place}}"),
            width=12,
        )
    )


def _process(to: Dashboard) -> None:
    to.with_row(Row("Process"))
    to.with_panel(
        lines(
            "Memory",
            "Resident; it does not grow with the number of clients.",
            units.BytesIEC,
            Query(f"process_resident_memory_bytes{{{DAEMONS}}}", "{{instance}}"),
            width=8,
        )
    ).with_panel(
        lines(
            "CPU",
            "Cores in use.",
            units.NoUnit,
            Query(f"rate(process_cpu_seconds_total{{{DAEMONS}}}[$__rate_interval])", "{{instance}}"),
            width=8,
        )
    ).with_panel(
        lines(
            "Open files",
            "Connections and transfers under way, against what the system allows.",
            units.NoUnit,
            Query(f"process_open_fds{{{DAEMONS}}}", "{{instance}} open"),
            Query(f"process_max_fds{{{DAEMONS}}}", "{{instance}} allowed"),
            width=8,
        )
    )


def _calls(to: Dashboard) -> None:
    to.with_row(Row("Calls"))
    calls = f"rate(fedpeft_grpc_requests_total{{{DAEMONS}}}[$__rate_interval])"
    to.with_panel(
        lines(
            "By method",
            "Calls that ended, a second.",
            units.RequestsPerSecond,
            Query(f"sum by (method) ({calls})", "{{method}}"),
        )
    ).with_panel(
        lines(
            "By code",
            "OK, or why not. UNAVAILABLE and RESOURCE_EXHAUSTED are asked again; INTERNAL and UNKNOWN are faults.",
            units.RequestsPerSecond,
            Query(f"sum by (code) ({calls})", "{{code}}"),
        )
    )
    to.with_panel(
        lines(
            "Duration",
            "95 % of the calls of the last 5 minutes took less; AwaitRound and WatchRun are held open on purpose.",
            units.Seconds,
            Query(f"method:fedpeft_grpc_request_seconds:p95_5m{{{DAEMONS}}}", "{{method}}"),
        )
    ).with_panel(
        lines(
            "Faults",
            "Share of the calls of the last 5 minutes that ended with a fault of the server's own.",
            units.PercentUnit,
            Query(f"instance:fedpeft_grpc_requests:fault_ratio5m{{{DAEMONS}}}", "{{instance}}"),
            limit=0.01,
        )
    )


def _bounds(to: Dashboard) -> None:
    to.with_row(Row("Bounds"))
    ends = f"increase(fedpeft_enrolment_ends_total{{{DAEMONS}}}[$__rate_interval])"
    to.with_panel(
        lines(
            "Enrolment refused",
            "Connections to the enrolment port that were refused or cut off, per second, by reason.",
            units.RequestsPerSecond,
            Query(f"sum by (why) (rate(fedpeft_enrolment_refused_total{{{DAEMONS}}}[$__rate_interval]))", "{{why}}"),
        )
    ).with_panel(
        lines(
            "Left out",
            "Log lines suppressed because one caller caused too many, and restarts of the enrolment process.",
            units.NoUnit,
            Query(f"rate(fedpeft_log_lines_left_out_total{{{DAEMONS}}}[$__rate_interval])", "{{instance}} lines/s"),
            Query(ends, "{{instance}} enrolment ended"),
        )
    )


def _evaluation(to: Dashboard) -> None:
    to.with_row(Row("Evaluation"))
    failed = f"increase(fedpeft_evaluations_failed_total{{{DAEMONS}}}[$__rate_interval])"
    to.with_panel(
        lines(
            "Backlog",
            "Versions still to be scored, of each run, by the evaluator that has most left.",
            units.NoUnit,
            Query(f"max by (run) (fedpeft_evaluation_backlog{{{DAEMONS}}})", "{{run}}"),
        )
    ).with_panel(
        lines("Not scored", "Versions that an evaluator could not score.", units.NoUnit, Query(failed, "{{run}}"))
    )
