"""Three daemons on one PostgreSQL and one S3, all under faults: nothing is lost or doubled, the bits are those of one.

`make chaos-several SCHEDULES=100` holds so many schedules; `FIRST` and `KEEP` are as in `test_chaos`.
"""

from __future__ import annotations

import shutil
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
