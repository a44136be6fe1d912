"""The fate of the last update that counted: a round may still exclude it when it closes, after the receipt.

Before a client trains for another ticket of a run it asks for the ticket before. If that update was excluded, it goes
into the residual, as one does that came too late; if the one before it was excluded too, residual and update are
dropped, because both would be in all that follow, and be excluded with them.
"""

from __future__ import annotations

import asyncio

from fedpeft.errors import NotFound, PermissionDenied, UpdateExcluded
from fedpeft.process.logs import Log
from fedpeft.v1 import run_pb2
from fedpeft_client.state.outbox import PendingBox
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Patience


class Recall:
    """Asks for updates that counted, and takes back those that were excluded."""

    def __init__(self, channel: Channel, patience: Patience, box: PendingBox) -> None:
        self._channel = channel
        self._patience = patience
        self._box = box

    async def settle(self, run: str, log: Log) -> None:
        """Settles the last counted update of a run for good, if there is one.

        Raises:
            StateInvalid: If the state directory cannot be written.
            FedpeftError: If the server refuses this client.
        """
        ticket = await asyncio.to_thread(self._box.counted, run)
        if ticket is None:
            return
        try:
            standing = await self._patience.keep(lambda: self._channel.get_upload(ticket, b""))
            reason = standing.reason if standing.state == run_pb2.TICKET_STATE_REFUSED else ""
        except (NotFound, PermissionDenied):  # the server was set up anew
            reason = ""
        if not reason.startswith(UpdateExcluded.reason):
            await asyncio.to_thread(self._box.confirm, run)
            return
        kept = await asyncio.to_thread(self._box.take_back, run)
        what = (
            "it goes into the residual" if kept else "the one before was not either, so it and the residual are dropped"
        )
        log.warning(f"the last update was not folded; {what}", ticket=ticket, cause=reason[:500])
