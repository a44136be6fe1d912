"""Errors of bytes, of the server and of the way to it."""

from __future__ import annotations

from fedpeft.errors.root import FedpeftError


class DataLoss(FedpeftError):
    """Bytes are not what they should be."""

    status = "DATA_LOSS"


class ChecksumMismatch(DataLoss):
    """A payload does not have the digest of its manifest."""


class BlobCorrupt(DataLoss):
    """A stored blob does not have its recorded digest."""

    for_sites = "a file of the server is missing or is not what was stored; its operator is to restore it"


class Unavailable(FedpeftError):
    """Not now; the same call may succeed later."""

    status = "UNAVAILABLE"


class Draining(Unavailable):
    """The server is shutting down."""


class DatabaseLocked(Unavailable):
    """Another program held a lock on the server's database for as long as a transaction waits for one."""

    for_sites = "the server's database is busy with other changes for now; call again"


class DatabaseUnavailable(Unavailable):
    """The server's database cannot be used for now; whether a transaction that it broke off was made may be unknown.

    Attributes:
        permanent: True if it stays so until somebody mends something: a file that is corrupt, or may not be written.
    """

    for_sites = "the server's database cannot be used for now; call again, and tell its operator if that lasts"
    permanent: bool = False


class StoreUnavailable(Unavailable):
    """A folder or object store of the server refuses to be read or written for now."""

    for_sites = "a store of the server refuses for now; call again, and tell its operator if that lasts"


class VersionBeingMade(Unavailable):
    """An update came while a version was being made, and counts in the next one; a server holds it back until then."""


class TransferStalled(Unavailable):
    """A transfer stopped making progress; it is continued by calling again."""


class ServerUnreachable(Unavailable):
    """No connection to the server.

    Attributes:
        permanent: True if it stays so until somebody mends something: another server answers there, for example.
    """

    permanent: bool = False


class Internal(FedpeftError):
    """A fault of the server."""

    status = "INTERNAL"
