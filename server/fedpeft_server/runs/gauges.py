"""Gauges of a run: its state, its round in progress, and the expected bytes of that round."""

from __future__ import annotations

from prometheus_client import Gauge

from fedpeft.rounds.state_machine import Phase, Round, policy_of
from fedpeft_server.metrics import Metrics
from fedpeft_server.store.rows import RunRow, RunState

_PARAMETER_BYTES = 4
"""A parameter as float32, which is what budgets are counted in, whatever the run's encoding."""


class RunGauges:
    """The gauges of one run, set when something that they show has changed: most transitions are receipts."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._shown: tuple[RunState, Round, int] | None = None

    def show(self, run: RunRow, current: Round) -> None:
        """Shows the run and its round in progress."""
        shown = run.state, current.without_tickets, len(current.tickets)
        if shown != self._shown:
            self._shown = shown
            _show(self._metrics, run, *shown[1:])


def _show(metrics: Metrics, run: RunRow, current: Round, tickets: int) -> None:
    """Shows a run and its round in progress, which comes without its tickets, and their number."""
    config = run.config
    metrics.run_info.labels(run.id, config.name, config.peft.method, config.model.name).set(1)
    for state in RunState:
        metrics.run_state.labels(run.id, state).set(state is run.state)
    metrics.round.labels(run.id).set(current.number)
    for phase in Phase:
        metrics.round_phase.labels(run.id, phase).set(phase is current.phase)
    under_way = current.phase in (Phase.OPEN, Phase.AGGREGATING) and not current.stopped
    _set_or_remove(metrics.round_opened, run.id, current.opened_at if under_way else None)
    _set_or_remove(metrics.round_deadline, run.id, current.deadline)
    metrics.round_extensions.labels(run.id).set(current.extensions)
    metrics.round_goal.labels(run.id).set(config.rounds.clients)
    metrics.round_quorum.labels(run.id).set(config.rounds.needed)
    metrics.round_available.labels(run.id).set(config.rounds.available)
    _show_budget(metrics, run, current, tickets)


def _show_budget(metrics: Metrics, run: RunRow, current: Round, tickets: int) -> None:
    rounds = run.config.rounds
    one_version = policy_of(rounds).one_version
    clients = max(rounds.sampled, tickets) if one_version else rounds.clients  # else those of a version
    base = current.base_version
    # A client of the round before holds its base; nobody holds anything before the first one.
    sent = {"up": run.spec.sent(current.number), "down": run.spec.changed(base - 1, base) if base else run.spec.shared}
    for direction, tensors in sent.items():
        parameters = sum(tensor.size for tensor in tensors)
        metrics.round_budget_bytes.labels(run.id, direction).set(_PARAMETER_BYTES * parameters * clients)
    whole = _PARAMETER_BYTES * run.model_parameters * clients
    _set_or_remove(metrics.full_finetuning_bytes, run.id, whole or None)


def _set_or_remove(gauge: Gauge, run: str, value: float | None) -> None:
    """Sets the gauge of a run, or removes it where there is nothing to show."""
    if value is None:
        gauge.remove_by_labels({"run": run})
    else:
        gauge.labels(run).set(value)
