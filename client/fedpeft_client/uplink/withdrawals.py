"""Giving a ticket back, so that its round does not wait."""

from __future__ import annotations

from fedpeft.errors import FedpeftError, LocalError
from fedpeft.process.logs import Log
from fedpeft.untrusted_text import MAX_REASON
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.error_policy import FAULT, NOT_ABOUT_THE_TASK
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry


class Withdrawals:
    """Gives tickets back, each with the words that the operator reads."""

    def __init__(self, channel: Channel, retry: Retry, egress_log: EgressLog) -> None:
        self._channel = channel
        self._retry = retry
        self._egress_log = egress_log

    async def withdraw(
        self, ticket: str, reason: str, run: str, number: int, log: Log
    ) -> run_pb2.TicketState.ValueType | None:
        """Gives a ticket of round `number` of a run back.

        Returns:
            State of the ticket, whose update may have counted. None if it is unknown by now, which is as good, or
            if the server failed in the call again and again: then the round waits for the ticket until its deadline.

        Raises:
            FedpeftError: If the server refuses this client rather than the ticket, or the ledger cannot be written.
        """
        request = pb.WithdrawRequest(ticket=ticket, reason=reason[:MAX_REASON])
        try:
            with self._egress_log.record(message_entries.withdrawal(request, run, number)):
                return (await self._retry.call(lambda: self._channel.withdraw(request))).state
        except (LocalError, *NOT_ABOUT_THE_TASK):
            raise
        except FAULT as error:
            log.error(
                "ticket could not be given back; its round waits until its deadline", ticket=ticket, cause=str(error)
            )
            return None
        except FedpeftError as error:
            log.info("the ticket is gone already", ticket=ticket, cause=str(error))
            return None
