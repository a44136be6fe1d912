"""The promises hold in every schedule of faults, in simulated time: kills, power failures, broken calls, wrong clocks.

`make test-schedules SCHEDULES=10000` holds so many, and has a machine die before each of its effects on its disk, by a
kill and by a power failure. `FIRST=SEED SCHEDULES=1` holds a schedule again, to the last message.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

FIRST, SCHEDULES = int(os.environ.get("FIRST", "1")), int(os.environ.get("SCHEDULES", "8"))
STEP = int(os.environ.get("STEP", "97"))
"""Every so manieth effect on a disk is one before which a machine dies; 1 for all."""
EFFECTS = 300
"""No machine has more of them, in a run that trains for seconds."""

Hold = Callable[[str], SimpleNamespace]


@pytest.fixture(scope="session")
def hold() -> Iterator[Hold]:
    """Holds worlds by the names of their schedules, in processes that have all modules and nothing else yet."""
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    with subprocess.Popen(
        [sys.executable, "-m", "simulated_time.world"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=environment,
    ) as worlds:
        assert worlds.stdin is not None
        assert worlds.stdout is not None
        to, back = worlds.stdin, worlds.stdout

        def held(name: str) -> SimpleNamespace:
            to.write(f"{name}\n")
            to.flush()
            return SimpleNamespace(**json.loads(back.readline()))

        yield held
        to.close()


@pytest.fixture(scope="session")
def undisturbed(hold: Hold) -> SimpleNamespace:
    return hold("undisturbed")


def told(outcome: SimpleNamespace) -> str:
    return "\n".join([*outcome.faults, *outcome.log])


def test_an_undisturbed_world_comes_to_its_end(undisturbed: SimpleNamespace) -> None:
    assert undisturbed.faults == [], told(undisturbed)
    assert (len(undisturbed.adapter), undisturbed.deaths, undisturbed.lost) == (64, 0, {})


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SCHEDULES))
def test_a_world_of_faults_ends_with_the_same_bits(seed: int, hold: Hold, undisturbed: SimpleNamespace) -> None:
    outcome = hold(str(seed))
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0,
    reason="this user may not mount a disk of a size (CAP_SYS_ADMIN)",
)
@pytest.mark.parametrize("seed", range(FIRST, FIRST + (SCHEDULES + 2) // 2))
def test_a_world_with_full_disks_ends_with_the_same_bits(seed: int, hold: Hold, undisturbed: SimpleNamespace) -> None:
    """A client without room gives its ticket back; after an extension, or once resumed, the round asks it again."""
    outcome = hold(f"full {seed}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter
    assert seed != 5 or outcome.without_room > 0


@pytest.mark.parametrize("seed", range(FIRST, FIRST + (SCHEDULES + 2) // 2))
def test_a_world_of_buffered_rounds_counts_each_receipt_once_and_is_replayed_to_the_bit(seed: int, hold: Hold) -> None:
    """The bits depend on the order of receipt; from that and the updates all versions are made again."""
    outcome = hold(f"buffered {seed}")
    assert outcome.faults == [], told(outcome)


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SCHEDULES))
def test_a_world_with_a_disk_that_rots_ends_with_the_same_bits(
    seed: int, hold: Hold, undisturbed: SimpleNamespace
) -> None:
    """A client whose update the server's disk damaged is asked for it again, and still has it."""
    outcome = hold(f"rot {seed}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter
    assert seed != 6 or outcome.rotten > 0


@pytest.mark.parametrize("seed", range(FIRST, FIRST + (SCHEDULES + 2) // 4))
def test_a_world_of_buffered_rounds_with_a_disk_that_rots_is_replayed_to_the_bit(seed: int, hold: Hold) -> None:
    """An update that is asked for again counts once, in the version that it comes in time for."""
    outcome = hold(f"buffered rot {seed}")
    assert outcome.faults == [], told(outcome)
    assert seed != 2 or outcome.rotten > 0


@pytest.mark.parametrize("how", ["", " power"], ids=["kill", "power failure"])
@pytest.mark.parametrize("effect", range(0, EFFECTS, STEP))
@pytest.mark.parametrize("machine", ["server", "a"])
def test_a_machine_that_dies_before_an_effect_loses_nothing(
    machine: str, effect: int, how: str, hold: Hold, undisturbed: SimpleNamespace
) -> None:
    outcome = hold(f"{machine} {effect}{how}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter
    assert outcome.deaths == 1 or outcome.effects[machine] <= effect + 1, "it had so many effects and lived"


def test_an_undisturbed_hierarchy_has_the_bits_of_the_flat_federation(hold: Hold) -> None:
    flat, tree = hold("quick, of exact sums"), hold("hierarchy quick")
    assert flat.faults == [] and tree.faults == [], told(tree)
    assert (tree.adapter, tree.deaths, tree.lost) == (flat.adapter, 0, {})
    assert tree.effects.keys() == {"server", "edge", "relay", "a", "b", "c"}


@pytest.mark.parametrize("seed", range(FIRST, FIRST + (SCHEDULES + 7) // 8))
@pytest.mark.parametrize("kind", ["", "rot "], ids=["deaths", "disks that rot"])
def test_a_hierarchy_of_faults_ends_with_the_same_bits(
    kind: str, seed: int, hold: Hold, undisturbed: SimpleNamespace
) -> None:
    """An edge's server and agent die as the others do; its run ends completed, with the parent's last version."""
    outcome = hold(f"hierarchy {kind}{seed}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter


@pytest.mark.parametrize("how", ["", " power"], ids=["kill", "power failure"])
@pytest.mark.parametrize("effect", range(STEP, EFFECTS, 3 * STEP))
@pytest.mark.parametrize("machine", ["edge", "relay"])
def test_a_machine_of_an_edge_that_dies_before_an_effect_loses_nothing(
    machine: str, effect: int, how: str, hold: Hold, undisturbed: SimpleNamespace
) -> None:
    outcome = hold(f"hierarchy {machine} {effect}{how}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter
    assert outcome.deaths == 1 or outcome.effects[machine] <= effect + 1, "it had so many effects and lived"


def test_a_schedule_is_the_same_history_each_time(hold: Hold) -> None:
    for name in ("5", "hierarchy 5"):
        first, again = hold(name), hold(name)
        assert first.deaths > 0
        assert first == again


def test_power_failures_of_the_server_lose_nothing(hold: Hold, undisturbed: SimpleNamespace) -> None:
    outcome = hold("power")
    assert outcome.faults == [], told(outcome)
    assert outcome.deaths >= 4
    assert outcome.adapter == undisturbed.adapter


def test_a_disk_that_does_not_force_what_it_says_is_found_out(hold: Hold) -> None:
    """The same power failures: the harness sees what is lost."""
    assert hold("power, and disks that lie").faults
