"""Exclusion after the receipt: a round may still exclude an update that was counted, when it closes, or lose it.

Before a client trains for another ticket of a run it asks for the ticket before. If that update was excluded, it goes
into the residual, as one does that came too late; if the one before it was excluded too, residual and update are
dropped, because both would be in all that follow, and be excluded with them. One that the server lost, and that did
not come again in time, goes into the residual in any case.
"""

from __future__ import annotations

import asyncio

from fedpeft.errors import NotFound, PermissionDenied, UpdateExcluded
from fedpeft.process.logs import Log
from fedpeft.v1 import run_pb2
from fedpeft_client.state.outbox import Outbox
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry


class ExclusionCheck:
    """Asks for the final state of counted updates, and takes back those that were excluded.

    Args:
        channel: The server.
        retry: The patience with it.
        outbox: The client's updates.
        has_residual: False for a relay, whose sums are dropped where an update goes into the residual.
    """

    def __init__(self, channel: Channel, retry: Retry, outbox: Outbox, *, has_residual: bool = True) -> None:
        self._channel = channel
        self._retry = retry
        self._outbox = outbox
        self._uncounted = "it goes into the residual" if has_residual else "the sum is dropped"
        self._has_residual = has_residual

    async def settle(self, run: str, log: Log) -> None:
        """Settles the last counted update of a run for good, if there is one.

        Raises:
            StateInvalid: If the state directory cannot be written.
            FedpeftError: If the server refuses this client.
        """
        ticket = await asyncio.to_thread(self._outbox.counted, run)
        if ticket is None:
            return
        try:
            standing = await self._retry.call(lambda: self._channel.get_upload(ticket, b""))
            state, reason = standing.state, standing.reason
        except (NotFound, PermissionDenied):  # the server was set up anew
            state, reason = run_pb2.TICKET_STATE_UNSPECIFIED, ""
        if state in (run_pb2.TICKET_STATE_LATE, run_pb2.TICKET_STATE_WITHDRAWN):  # a receipt came before: it was lost
            await asyncio.to_thread(self._outbox.take_back, run, faulty=False)
            log.warning(f"the server lost the last update; {self._uncounted}", ticket=ticket, cause=reason[:500])
            return
        if state != run_pb2.TICKET_STATE_REFUSED or not reason.startswith(UpdateExcluded.reason):
            await asyncio.to_thread(self._outbox.confirm, run)
            return
        kept = await asyncio.to_thread(self._outbox.take_back, run)
        both = "the one before was not either, so it and the residual are dropped"
        what = self._uncounted if kept or not self._has_residual else both
        log.warning(f"the last update was not folded; {what}", ticket=ticket, cause=reason[:500])
