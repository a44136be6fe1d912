"""Errors of a request that is wrong in itself: the same call will fail again."""

from __future__ import annotations

from fedpeft.errors.root import FedpeftError


class InvalidArgument(FedpeftError):
    """The caller sent something wrong."""

    status = "INVALID_ARGUMENT"


class ConfigInvalid(InvalidArgument):
    """A run file, or the configuration sent with CreateRun, breaks a rule."""


class SpecInvalid(InvalidArgument):
    """An adapter spec is empty, unsorted, over a limit, or names a dtype or role there is not."""


class ManifestInvalid(InvalidArgument):
    """A manifest does not fit the adapter spec."""


class ExamplesInvalid(InvalidArgument):
    """An update claims no example, or more than one may claim."""


class ChunkInvalid(InvalidArgument):
    """A chunk is empty, over 1 MiB, beyond the payload's end, or where the header belongs."""


class UploadIncomplete(InvalidArgument):
    """The caller ended the stream of an upload before the whole payload was sent."""


class DigestInvalid(InvalidArgument):
    """A SHA-256 digest in a request is neither absent nor 32 bytes long."""


class ProgressInvalid(InvalidArgument):
    """A client says that it has done more steps than its training has."""


class PayloadInvalid(InvalidArgument):
    """The bytes of a payload do not decode to finite values."""


class MetricsInvalid(InvalidArgument):
    """Figures are missing, not finite, out of range, too many, or badly named."""


class AnswerInvalid(InvalidArgument):
    """An answer to the offer of a run neither accepts nor declines, or declines without a reason."""


class CapabilitiesInvalid(InvalidArgument):
    """A client says more of itself than is kept, or not which role it has."""


class PageInvalid(InvalidArgument):
    """The size of a page is negative, or its token is not one of this list."""


class MessageInvalid(InvalidArgument):
    """The bytes of a request are not the message that the call takes, or there is none."""


class RunsInvalid(InvalidArgument):
    """A client asks about more runs than one call may name."""


class SubjectInvalid(InvalidArgument):
    """The name, the role or the life in a request for an enrolment token or a revocation."""


class SigningRequestInvalid(InvalidArgument):
    """A signing request is malformed, wrongly signed, or its key is not on P-256."""


class OutOfRange(FedpeftError):
    """A position beyond what exists."""

    status = "OUT_OF_RANGE"


class OffsetOutOfRange(OutOfRange):
    """A transfer was continued at a byte where it does not stand."""
