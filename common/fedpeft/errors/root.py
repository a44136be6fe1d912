"""The root of the tree of errors, and its traversal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Self


class FedpeftError(Exception):
    """An error with one sentence that says what is wrong, where, and what would be right.

    Attributes:
        message: The sentence.
        fields: Field-level faults as (path, description), for example ("rounds.count", "must be at least 1").
    """

    status: ClassVar[str] = "UNKNOWN"
    """Name of the gRPC status code."""

    reason: str = "UNKNOWN"
    """`ErrorInfo.reason`: the class name in upper case with underscores; where no class here has the reason that the
    server sent, the instance holds it."""

    retry_s: float | None = None
    """`RetryInfo.retry_delay` in seconds: nothing failed, the caller goes on after this pause; None: no such hint."""

    for_sites: ClassVar[str] = ""
    """Sentence that callers who do not operate the server are told where the message names its places; empty: the
    message."""

    def __init__(self, message: str, fields: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.fields = fields

    def within(self, path: str) -> Self:
        """Returns this error with its fields moved below `path`: a part of a request need not know where it lies."""
        self.fields = tuple((f"{path}.{field}", text) for field, text in self.fields)
        return self

    @property
    def in_short(self) -> str:
        """The fault alone, without the cure that stands behind a semicolon; for a line with little room."""
        return self.message.partition(";")[0]

    def __init_subclass__(cls) -> None:
        cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()


def tree(root: type[FedpeftError] = FedpeftError) -> Iterator[type[FedpeftError]]:
    """Yields `root` and every class below it, depth first."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def of_reason(reason: str, otherwise: type[FedpeftError]) -> type[FedpeftError]:
    """Returns the class of a reason, or another one if no class has it."""
    return next((cls for cls in tree() if cls.reason == reason), otherwise)


def of_status(status: str, otherwise: type[FedpeftError]) -> type[FedpeftError]:
    """Returns the class at the head of the errors of a gRPC status code, or another one if no class has it."""
    return next((cls for cls in FedpeftError.__subclasses__() if cls.status == status), otherwise)
