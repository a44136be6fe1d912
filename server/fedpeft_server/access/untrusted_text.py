"""Text that callers choose: bounded, and without terminal control sequences, because operators read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

from fedpeft import ids
from fedpeft.errors import CapabilitiesInvalid
from fedpeft.untrusted_text import MAX_REASON, plain
from fedpeft.v1 import federation_service_pb2 as pb

MAX_TEXT = 256
"""Most characters of `software` and of `device`."""
MAX_NAMES = 64
"""Most `methods`, and most `encodings`."""
MAX_NAME = 64
"""Most characters of one of them."""
MAX_PROCESSES = 64
"""Most `earlier_processes`."""
MAX_EXAMPLES = 10**9
"""Most examples that a client may declare, and claim for an update."""
MAX_DECLINE_REASONS = 8
MAX_DECLINE_CHARACTERS = 512


def capabilities(said: pb.Capabilities) -> pb.Capabilities:
    """Returns what is kept of a client's capabilities: the fields that this server knows.

    Raises:
        CapabilitiesInvalid: With each field that is too large.
    """
    faults = tuple(_faults(said))
    if faults:
        text = "; ".join(f"{field} {fault}" for field, fault in faults)
        raise CapabilitiesInvalid(f"the client's capabilities are too large: {text}", faults)
    return pb.Capabilities(
        software=plain(said.software),
        methods=map(plain, said.methods),
        encodings=map(plain, said.encodings),
        device=plain(said.device),
        examples=said.examples,
    )


def decline(said: Iterable[str]) -> tuple[str, ...]:
    """Returns what is kept of the reasons of a decline."""
    worded = (plain(reason[:MAX_DECLINE_CHARACTERS]) for reason in said if reason.strip())
    return tuple(islice(worded, MAX_DECLINE_REASONS))


def software(said: str) -> str:
    """Returns what is kept of the name of a device's software."""
    return plain(said[:MAX_TEXT])


def processes(said: Sequence[str]) -> frozenset[str]:
    """Returns the processes that a client's state knows of.

    Raises:
        CapabilitiesInvalid: If there are too many, or one is malformed.
    """
    field, digits = "earlier_processes", "32 hexadecimal digits"
    if len(said) > MAX_PROCESSES:
        fault = f"are {len(said)}; at most {MAX_PROCESSES} are taken"
        raise CapabilitiesInvalid(f"{field} {fault}", ((field, fault),))
    if not all(map(ids.INSTANCE.fullmatch, said)):
        raise CapabilitiesInvalid(f"each of {field} must be {digits}", ((field, f"are not all {digits}"),))
    return frozenset(said)


def reason(said: str) -> str:
    """Returns what is kept of why something is done."""
    return plain(said[:MAX_REASON])


def _faults(said: pb.Capabilities) -> Iterator[tuple[str, str]]:
    for name, text in (("software", said.software), ("device", said.device)):
        if len(text) > MAX_TEXT:
            yield f"capabilities.{name}", f"has {len(text)} characters; at most {MAX_TEXT} are taken"
    yield from _names("capabilities.methods", said.methods)
    yield from _names("capabilities.encodings", said.encodings)
    if said.examples > MAX_EXAMPLES:
        yield "capabilities.examples", f"is {said.examples}; at most {MAX_EXAMPLES} are taken"


def _names(field: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    if len(names) > MAX_NAMES:
        yield field, f"has {len(names)} names; at most {MAX_NAMES} are taken"
    long = [len(name) for name in names if not 1 <= len(name) <= MAX_NAME]
    if long:
        yield field, f"has a name of {long[0]} characters; 1 to {MAX_NAME} are taken"
