"""Errors of a call that the state of the server, the run or the ticket does not allow."""

from __future__ import annotations

from fedpeft.errors.root import FedpeftError


class FailedPrecondition(FedpeftError):
    """The state does not allow the call."""

    status = "FAILED_PRECONDITION"


class ProtocolMismatch(FailedPrecondition):
    """Client and server speak no common protocol version."""


class NotRegistered(FailedPrecondition):
    """The client did not call Register."""


class ClientMoved(FailedPrecondition):
    """A copy of the client's state has gone on elsewhere, and this one was left behind."""


class RoundClosed(FailedPrecondition):
    """The update came after its round had closed."""


class TicketClosed(FailedPrecondition):
    """The ticket was withdrawn, or its update was refused."""


class UpdateExcluded(FailedPrecondition):
    """The update was received, and was not folded when its round closed."""


class RunNotRelayed(FailedPrecondition):
    """The run makes its versions itself, and is not the part of a parent's run."""


class RelayDiffers(FailedPrecondition):
    """The run is relayed for another client of the parent's server."""


class RunRelayed(FailedPrecondition):
    """The run is the part of a parent's run, which makes its versions."""


class VersionSuperseded(FailedPrecondition):
    """The parent's version came after a later one."""


class VersionDiffers(FailedPrecondition):
    """The parent made a version of this number again, of other content."""


class RunFinished(FailedPrecondition):
    """The run is completed or stopped."""


class RunNotFinished(FailedPrecondition):
    """The run is neither completed nor stopped."""


class NoAuthority(FailedPrecondition):
    """The server has no key to sign certificates with."""


class SelfRevocation(FailedPrecondition):
    """An operator asks to revoke the identity that it asks with."""
