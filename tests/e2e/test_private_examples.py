"""DP-SGD at a client over the network: a client that is killed goes on with what its steps spent, and ends with it."""

from __future__ import annotations

from pathlib import Path

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from safetensors.numpy import load_file

from ..run_files import TINY_MODEL
from .conftest import Federation, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded"), pytest.mark.timeout(300)]

NOISE, DELTA, TARGET = 1.5, 1e-3, 1.6
EXAMPLES, BATCH, STEPS = 16, 4, 2
RUN_FILE = f"""
name = "private"
{TINY_MODEL}
[peft]
method = "head"
[rounds]
count = 9
clients = 1
deadline_s = 300
[training]
steps = {STEPS}
batch_size = {BATCH}
[privacy]
mechanism = "example"
clip_norm = 1.0
noise_multiplier = {NOISE}
target_epsilon = {TARGET}
delta = {DELTA}
"""


def on_paper(rounds: int) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    step = dp_accounting.PoissonSampledDpEvent(BATCH / EXAMPLES, dp_accounting.GaussianDpEvent(NOISE))
    accountant.compose(step, rounds * STEPS)
    return float(accountant.get_epsilon(DELTA))


def spent(state: Path, run: str) -> tuple[list[float], list[float]]:
    """Returns what the ledger in a client's state holds: the steps, by the examples that there were."""
    ledger = load_file(state / "runs" / run / "privacy.safetensors")
    return ledger["examples"].tolist(), ledger["steps"].tolist()


def test_a_client_that_is_killed_goes_on_with_what_it_spent_and_ends_with_its_budget(federation: Federation) -> None:
    federation.run_file.write_text(RUN_FILE)
    federation.server()
    between = federation.client("alice")
    run, state = federation.create(), federation.folder / "alice" / "state"
    wait_for(lambda: between.events("update received"), "the receipt of round 1", 0.002)
    federation.kill(between)
    within = federation.client("alice")
    wait_for(lambda: within.events("training begins"), "a training after the restart", 0.002)
    federation.kill(within)
    last = federation.client("alice")
    refused, *_ = wait_for(lambda: last.events("run is declined"), "the end of the budget")
    assert refused["cause"] == (
        f"the privacy budget is spent: with round 4 of this client epsilon would be {on_paper(4):.4g}, and "
        f"privacy.target_epsilon of this run is {TARGET}"
    )
    assert spent(state, run) == ([EXAMPLES], [3 * STEPS])
    wait_for(lambda: federation.show(run)["privacy"]["epsilon"] > on_paper(2), "the third version")
    shown = federation.show(run)
    told = [ticket["metrics"] for row in shown["rounds"] for ticket in row["tickets"]]
    assert [each["privacy_epsilon"] for each in told] == [pytest.approx(on_paper(k), abs=1e-9) for k in (1, 2, 3)]
    assert shown["privacy"]["epsilon"] == pytest.approx(on_paper(3), abs=1e-9) and on_paper(3) <= TARGET < on_paper(4)
    assert not any("loss" in each for each in told) and {each["privacy_noise_multiplier"] for each in told} == {NOISE}
    shown = wait_for(lambda: (s := federation.show(run))["declines"] and s, "the decline")
    (given_up,) = shown["in_progress"]["tickets"]
    assert (given_up["state"], given_up["reason"]) == ("withdrawn", refused["cause"])
    assert [(each["client"], each["reasons"]) for each in shown["declines"]] == [("alice", [refused["cause"]])]
