"""Real processes under faults: nothing that has a receipt is lost or doubled, and the run ends with the same bits.

`make chaos SCHEDULES=300` holds so many schedules; `FIRST=SEED SCHEDULES=1` holds one again: the same faults at the
same moments, on a machine that is never quite the same. `STEP=1` has the daemon and a client die before each of their
effects on a disk, by a kill and by a failure of the power. With `KEEP=FOLDER` all files of a broken world are kept.
"""

from __future__ import annotations

import os
import subprocess
from types import SimpleNamespace

import pytest

from .conftest import Hold, told

SMOKE = (45, 173)
FIRST, SCHEDULES = int(os.environ.get("FIRST", "1")), int(os.environ.get("SCHEDULES", "0"))
SEEDS = range(FIRST, FIRST + SCHEDULES) if SCHEDULES else SMOKE
STEP = int(os.environ.get("STEP", "0"))
EFFECTS = {"server": 1600, "a": 500}
"""No machine has more of them."""
MAY_MOUNT = subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a disk of a size (CAP_SYS_ADMIN)"),
    *([] if SCHEDULES else [pytest.mark.xdist_group("chaos")]),
]


@pytest.mark.parametrize("seed", SEEDS)
def test_processes_under_faults_end_with_the_same_bits(seed: int, hold: Hold, undisturbed: SimpleNamespace) -> None:
    outcome = hold(str(seed))
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter or not outcome.is_exact


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + SCHEDULES // 5))
def test_processes_in_a_storm_of_faults_end_with_the_same_bits(
    seed: int, hold: Hold, undisturbed: SimpleNamespace
) -> None:
    outcome = hold(f"storm {seed}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter or not outcome.is_exact


@pytest.mark.slow
@pytest.mark.skipif(not STEP, reason="STEP=1 walks all effects")
@pytest.mark.parametrize("how", ["", " power"], ids=["kill", "power failure"])
@pytest.mark.parametrize(
    ("machine", "effect"), [(m, n) for m, most in EFFECTS.items() for n in range(0, most, STEP or 50)]
)
def test_a_process_that_dies_before_an_effect_loses_nothing(
    machine: str, effect: int, how: str, hold: Hold, undisturbed: SimpleNamespace
) -> None:
    outcome = hold(f"{machine} {effect}{how}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter
    assert outcome.deaths == 1 or outcome.effects[machine] <= effect + 1, "it had so many effects and lived"


@pytest.mark.slow
def test_a_disk_that_does_not_force_what_it_says_is_found_out(hold: Hold) -> None:
    faults = " ".join(hold("disks that lie").faults)
    assert "restore" in faults or "receipt" in faults or "lost" in faults
