"""Errors of a limit that is reached, and of a transfer that is to go on later."""

from __future__ import annotations

from fedpeft.errors.root import FedpeftError


class ResourceExhausted(FedpeftError):
    """A limit is reached."""

    status = "RESOURCE_EXHAUSTED"


class UpdateTooLarge(ResourceExhausted):
    """A payload is larger than the server takes."""


class MessageTooLarge(ResourceExhausted):
    """A message has more bytes or more fields than its call takes, or a stream has too many small ones."""


class TransfersBusy(ResourceExhausted):
    """As many transfers as the server serves at once are under way; who asks again at once keeps its place."""

    retry_s = 0.0


class TooManyClients(ResourceExhausted):
    """As many clients as the server takes are registered."""


class TooManyCalls(ResourceExhausted):
    """A caller makes more calls, at once or in time, than one may."""

    retry_s = 5.0


class TooManyCertificates(ResourceExhausted):
    """One name was given as many certificates as it may have within half the life of one."""


class AnswerTooLarge(ResourceExhausted):
    """An answer does not fit into one message; ask for less at once."""


class DiskFull(ResourceExhausted):
    """There is no room to make the data durable."""

    for_sites = "no room is left to store this; the server's operator is to free some"


class Aborted(FedpeftError):
    """Nothing is wrong, but this call does not end it; ask where it stands and go on."""

    status = "ABORTED"
    retry_s = 0.0


class TurnOver(Aborted):
    """A transfer has had its turn and others wait; it goes on where it stands."""


class BeingChecked(Aborted):
    """An upload is whole and is being checked and made durable; ask again for the receipt."""
