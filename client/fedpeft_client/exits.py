"""Exit codes, and which error gives which."""

from __future__ import annotations

from enum import IntEnum

from fedpeft.errors import (
    BackboneMismatch,
    ClientIdInUse,
    ClientIdInvalid,
    ConfigInvalid,
    DataInvalid,
    ModelInvalid,
    NotRegistered,
    ProtocolMismatch,
    RefusedByPolicy,
    SettingsInvalid,
    SpecInvalid,
    Unavailable,
)
from fedpeft_client.patience import NOT_NOW

UNFIT = (BackboneMismatch, ConfigInvalid, DataInvalid, ModelInvalid, SpecInvalid)
"""Errors that say that this site cannot work for a run until someone changes something."""

NOT_ABOUT_THE_TASK = (ClientIdInUse, ClientIdInvalid, NotRegistered, ProtocolMismatch, *NOT_NOW)
"""Errors that concern this client as a whole, whatever it was about to do."""


class Exit(IntEnum):
    """What the process ends with."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    UNFIT = 4


def exit_code(error: BaseException) -> Exit:
    """Returns the exit code for an error that ends the process."""
    if isinstance(error, SettingsInvalid):
        return Exit.USAGE
    if isinstance(error, Unavailable):
        return Exit.UNREACHABLE
    return Exit.UNFIT if isinstance(error, (*UNFIT, RefusedByPolicy)) else Exit.FAILED
