"""Errors about what exists: something named is not there, or something else is there already."""

from __future__ import annotations

from fedpeft.errors.root import FedpeftError


class NotFound(FedpeftError):
    """Something named does not exist."""

    status = "NOT_FOUND"


class RunNotFound(NotFound):
    """No run of that id."""


class VersionNotFound(NotFound):
    """The run has no such adapter version."""


class VersionRemoved(VersionNotFound):
    """The files of the adapter version were removed by the server's retention; its record is there."""


class SumNotFound(NotFound):
    """The run has no sum of that round."""


class TicketNotFound(NotFound):
    """No ticket of that id."""


class ClientNotFound(NotFound):
    """No client of this id ever registered."""


class TokenNotFound(NotFound):
    """No enrolment token of that id."""


class IdentityNotFound(NotFound):
    """Nobody of that role and name was enrolled or has called."""


class AlreadyExists(FedpeftError):
    """Something exists already and differs."""

    status = "ALREADY_EXISTS"


class ClientIdInUse(AlreadyExists):
    """Another live instance holds this client id."""


class UpdateDiffers(AlreadyExists):
    """Another update was already received for the ticket."""


class RequestIdReused(AlreadyExists):
    """CreateRun was repeated under one request id with another run."""


class NameInUse(AlreadyExists):
    """A client and an evaluator cannot share a name, for it is their id."""
