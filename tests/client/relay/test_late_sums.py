"""A sum that does not count is dropped: there is no state of training that it could go into."""

from __future__ import annotations

import pytest
from structlog.testing import capture_logs

from fedpeft.v1 import run_pb2
from fedpeft_client.state.outbox import Outcome
from fedpeft_client.uplink.exclusion_check import ExclusionCheck
from fedpeft_client.uplink.push import Pusher

from ..transfer_site import IF_COUNTED, IF_NOT, LOCAL, Site


def names(site: Site) -> set[str]:
    return {path.name for path in (site.directory.path / "runs" / site.run.id).iterdir()}


async def test_a_late_sum_is_dropped_and_said(site: Site) -> None:
    pending = site.pending()
    for name in (IF_COUNTED, IF_NOT, LOCAL):
        (pending.folder / name).unlink()
    site.ticket.state = run_pb2.TICKET_STATE_LATE
    pusher = Pusher(site.channel, site.retry, site.egress_log, has_residual=False)
    with capture_logs() as lines:
        outcome = await pusher.push(pending, site.log)
    assert outcome is Outcome.NOT_COUNTED
    assert lines[-1]["event"] == "update was not counted; the sum is dropped"
    site.outbox.settle(pending, outcome)
    assert site.outbox.load() is None and not names(site)


@pytest.mark.parametrize("number", [1, 2])
async def test_an_excluded_sum_is_dropped_and_said(site: Site, number: int) -> None:
    pending = site.pending()
    for name in (IF_COUNTED, IF_NOT, LOCAL):
        (pending.folder / name).unlink()
    site.outbox.settle(pending, Outcome.COUNTED)
    if number == 2:
        (site.directory.path / "runs" / site.run.id / "excluded").write_text("ticket-0")
    site.ticket.state, site.ticket.reason = run_pb2.TICKET_STATE_REFUSED, "UPDATE_EXCLUDED: its norm is 9"
    with capture_logs() as lines:
        await ExclusionCheck(site.channel, site.retry, site.outbox, has_residual=False).settle(site.run.id, site.log)
    assert lines[-1]["event"] == "the last update was not folded; the sum is dropped"
    assert names(site) <= {"excluded"}
