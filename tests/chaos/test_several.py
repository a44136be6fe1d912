"""Three daemons on one PostgreSQL and one S3, all under faults: nothing is lost or doubled, the bits are those of one.

`make chaos-several SCHEDULES=100` holds so many schedules; `FIRST` and `KEEP` are as in `test_chaos`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ..server.object_store import program
from .conftest import Hold, told
from .test_chaos import FIRST, SCHEDULES

SMOKE = (1,)
MISSING = [name for name in ("initdb", "postgres") if shutil.which(name) is None]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} of PostgreSQL are not installed: apt-get install postgresql"),
    pytest.mark.skipif(program() is None, reason="moto_server, an S3 for tests, is not installed: make s3"),
    *([] if SCHEDULES else [pytest.mark.xdist_group("chaos")]),
]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST, FIRST + SCHEDULES) if SCHEDULES else SMOKE)
def test_several_daemons_under_faults_end_with_the_bits_of_one(
    seed: int, hold: Hold, undisturbed: SimpleNamespace
) -> None:
    outcome = hold(f"several {seed}")
    assert outcome.faults == [], told(outcome)
    assert outcome.adapter == undisturbed.adapter or not outcome.is_exact


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "command",
    [
        ["chaos.takeover", "--times", "2"],
        ["chaos.database_restarts", "--uploads", "400", "--clients", "20", "--folder"],
    ],
    ids=["the one that folds is killed", "the database is restarted"],
)
def test_every_receipt_counts_once(command: list[str]) -> None:
    """See the modules: each ends with an error where a promise was broken, or something hangs."""
    folder = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
