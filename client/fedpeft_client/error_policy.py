"""Exit codes, and which error gives which."""

from __future__ import annotations

from enum import IntEnum

from fedpeft.errors import (
    BackboneMismatch,
    BudgetExhausted,
    CertificateExpired,
    CertificateInvalid,
    CertificateMissing,
    CertificateRevoked,
    ClientIdInUse,
    ClientMoved,
    ConfigInvalid,
    DataInvalid,
    DiskFull,
    FedpeftError,
    IdentityInvalid,
    Internal,
    ModelInvalid,
    NotRegistered,
    ProtocolMismatch,
    RefusedByPolicy,
    RelayDiffers,
    RoleMayNot,
    SettingsInvalid,
    SpecInvalid,
    TokenExpired,
    TokenUnknown,
    TokenUsed,
    Unauthenticated,
    Unavailable,
)

NOT_NOW = (DiskFull, Unavailable)
"""Errors of a server that cannot do its work for now; the same call may succeed later."""
FAULT = Internal
"""A server that is there and fails in a call, or answers what nobody understands: repeating it may help, or never."""

UNFIT = (BackboneMismatch, BudgetExhausted, ConfigInvalid, DataInvalid, ModelInvalid, RelayDiffers, SpecInvalid)
"""Errors that say that this site cannot work for a run, for good or until someone changes something."""

NOT_LET_IN = (
    CertificateExpired,
    CertificateInvalid,
    CertificateMissing,
    CertificateRevoked,
    RoleMayNot,
    TokenExpired,
    TokenUnknown,
    TokenUsed,
)
"""Errors that say that the server does not know this client, or not any more; its operator can change that."""

NOT_ABOUT_THE_TASK = (
    ClientIdInUse,
    ClientMoved,
    NotRegistered,
    ProtocolMismatch,
    RoleMayNot,
    Unauthenticated,
    *NOT_NOW,
)
"""Errors that concern this client as a whole, whatever it was about to do."""


class Exit(IntEnum):
    """Exit code of the process."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    UNFIT = 4
    NOT_LET_IN = 5
    INTERRUPTED = 130


_CODES: tuple[tuple[tuple[type[FedpeftError], ...], Exit], ...] = (
    ((IdentityInvalid, SettingsInvalid), Exit.USAGE),
    ((Unavailable,), Exit.UNREACHABLE),
    ((*UNFIT, RefusedByPolicy), Exit.UNFIT),
    (NOT_LET_IN, Exit.NOT_LET_IN),
)


def exit_code(error: BaseException) -> Exit:
    """Returns the exit code for an error that ends the process."""
    return next((code for classes, code in _CODES if isinstance(error, classes)), Exit.FAILED)
