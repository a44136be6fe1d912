"""Errors of this machine alone, which never cross the network."""

from __future__ import annotations

from fedpeft.errors.root import FedpeftError


class LocalError(FedpeftError):
    """An error of this process that never crosses the network."""


class SettingsInvalid(LocalError):
    """A flag, an environment variable or a settings file is wrong."""


class DataInvalid(LocalError):
    """A data set cannot be used."""


class ModelInvalid(LocalError):
    """A model or its weights cannot be used."""


class BackboneMismatch(LocalError):
    """The frozen tensors here differ from those of the run."""


class StateInvalid(LocalError):
    """A state or data directory cannot be used."""


class IdentityInvalid(LocalError):
    """A key, a certificate, a signing request or an enrolment token cannot be used."""


class AuditBroken(LocalError):
    """An audit log does not hold together: an entry was changed, removed, or put in."""


class TrainingFailed(LocalError):
    """Local training ended without an update."""


class BudgetExhausted(LocalError):
    """A client has no privacy budget left for another update of a run."""


class RefusedByPolicy(LocalError):
    """A server asks for more than the policy of this site allows, or at a time when it allows nothing."""
