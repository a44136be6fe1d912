"""Errors about the caller: not known, or known and without the right."""

from __future__ import annotations

from fedpeft.errors.root import FedpeftError


class PermissionDenied(FedpeftError):
    """The caller may not do this."""

    status = "PERMISSION_DENIED"


class TicketOfAnother(PermissionDenied):
    """The ticket was given to another client."""


class NotAnEvaluator(PermissionDenied):
    """A client that did not register as an evaluator sends figures of a version."""


class RoleMayNot(PermissionDenied):
    """The role of the caller's certificate has no right to the call."""


class Unauthenticated(FedpeftError):
    """The caller is not known."""

    status = "UNAUTHENTICATED"


class ClientIdInvalid(Unauthenticated):
    """The metadata that names the client is missing or malformed."""


class CertificateMissing(Unauthenticated):
    """The call needs a certificate, and the connection has none."""


class CertificateInvalid(Unauthenticated):
    """The caller's certificate names no role and name."""


class CertificateExpired(Unauthenticated):
    """The caller's certificate has ended since the connection was made."""


class CertificateRevoked(Unauthenticated):
    """The caller's certificates were revoked."""


class TokenUnknown(Unauthenticated):
    """No enrolment token has this secret."""


class TokenExpired(Unauthenticated):
    """The enrolment token is too old."""


class TokenUsed(Unauthenticated):
    """The enrolment token was used by another key."""
