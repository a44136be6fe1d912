"""What a client may say of itself: bounded, because it is stored and shown to operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedpeft.errors import CapabilitiesInvalid
from fedpeft.v1 import federation_service_pb2 as pb

MAX_TEXT = 256
"""Most characters of `software` and of `device`."""
MAX_NAMES = 64
"""Most `methods`, and most `encodings`."""
MAX_NAME = 64
"""Most characters of one of them."""
MAX_EXAMPLES = 2**63 - 1


def stored(capabilities: pb.Capabilities) -> bytes:
    """Returns what is kept of a client's capabilities: the fields that this server knows.

    Raises:
        CapabilitiesInvalid: With each field that is too large.
    """
    faults = tuple(_faults(capabilities))
    if faults:
        said = "; ".join(f"{field} {fault}" for field, fault in faults)
        raise CapabilitiesInvalid(f"the client says too much of itself: {said}", faults)
    kept = pb.Capabilities()
    kept.CopyFrom(capabilities)
    kept.DiscardUnknownFields()
    return kept.SerializeToString()


def _faults(capabilities: pb.Capabilities) -> Iterator[tuple[str, str]]:
    for name, text in (("software", capabilities.software), ("device", capabilities.device)):
        if len(text) > MAX_TEXT:
            yield f"capabilities.{name}", f"has {len(text)} characters; at most {MAX_TEXT} are taken"
    yield from _names("capabilities.methods", capabilities.methods)
    yield from _names("capabilities.encodings", capabilities.encodings)
    if capabilities.examples > MAX_EXAMPLES:
        yield "capabilities.examples", f"is {capabilities.examples}; at most {MAX_EXAMPLES} are taken"


def _names(field: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    if len(names) > MAX_NAMES:
        yield field, f"has {len(names)} names; at most {MAX_NAMES} are taken"
    long = [len(name) for name in names if not 1 <= len(name) <= MAX_NAME]
    if long:
        yield field, f"has a name of {long[0]} characters; 1 to {MAX_NAME} are taken"
