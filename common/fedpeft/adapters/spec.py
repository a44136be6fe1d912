"""The adapter spec: which tensors are tuned, and what happens to each in every round.

Payloads are built from this list and from nothing else, so a method that keeps a tensor at the client, or trains
another half each round, needs no code outside its own file.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import pairwise

from fedpeft.codecs import codecs
from fedpeft.errors import SpecInvalid

MAX_TENSORS = 4096
MAX_NAME_BYTES = 256
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**31

_SECTION = re.compile(r"[a-z][a-z0-9_]{0,31}")

DTYPE = "F32"
"""The only element type of an adapter in protocol 1, as the safetensors format writes it."""


class TensorRole(StrEnum):
    """Role of a tuned tensor in one round."""

    SENT = "sent"
    """Trained by the client and part of its update."""

    LOCAL = "local"
    """Trained by the client and kept there. Such a tensor is sent in no round: its values would be lost, or leave."""

    FROZEN = "frozen"
    """Part of the adapter, not trained in this round."""

    DERIVED = "derived"
    """Part of the adapter, not trained: the server's strategy makes it of the changes of other tensors, in every round
    anew. Such a tensor has this role in all rounds."""

    @property
    def trains(self) -> bool:
        """True if the client changes the tensor."""
        return self in (TensorRole.SENT, TensorRole.LOCAL)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of versions and updates, with an encoding and a weighting of its own.

    Attributes:
        name: Its name; the tensors of every section but the adapter are named NAME/MEMBER.
        divisor: The server adds the plain sum of the clients' changes, divided by this; None: it folds by the strategy.
        encoding: The codec in both directions; None: as the run file says.
    """

    name: str
    divisor: float | None = None
    encoding: str | None = None


ADAPTER = Section("adapter")
"""The section of the tuned tensors, the only one of most runs."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a run (float32).

    Attributes:
        name: The parameter's name inside the tuned model, or in another section than the adapter SECTION/MEMBER.
        shape: Extents, outermost first.
        roles: The roles in turn; round r (1, 2, ...) uses ``roles[(r - 1) % len(roles)]``.
        section: The part of the payload that it belongs to.
    """

    name: str
    shape: tuple[int, ...]
    roles: tuple[TensorRole, ...] = (TensorRole.SENT,)
    section: Section = ADAPTER

    @property
    def member(self) -> str:
        """Its name inside the section."""
        return self.name if self.section == ADAPTER else self.name.removeprefix(f"{self.section.name}/")

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def role(self, number: int) -> TensorRole:
        """Returns the role in round `number` (1, 2, ...)."""
        return self.roles[(number - 1) % len(self.roles)]


@dataclass(frozen=True)
class AdapterSpec:
    """Every tuned tensor of a run, and those of its other sections, sorted by name.

    Raises:
        SpecInvalid: If the tensors are none, too many, unsorted, or one of them breaks a limit.
    """

    method: str
    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def of(cls, method: str, tensors: Iterable[TensorSpec]) -> AdapterSpec:
        """Builds a spec from tensors in any order."""
        return cls(method, tuple(sorted(tensors, key=lambda t: t.name)))

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The sections beside the adapter, sorted by name."""
        return tuple(sorted({t.section for t in self.tensors} - {ADAPTER}, key=lambda s: s.name))

    @cached_property
    def adapter(self) -> AdapterSpec:
        """The spec without other sections than the adapter."""
        if not self.sections:
            return self
        return AdapterSpec(self.method, tuple(t for t in self.tensors if t.section == ADAPTER))

    @cached_property
    def shared(self) -> tuple[TensorSpec, ...]:
        """The tensors of an adapter version: all that are local in no round."""
        return tuple(t for t in self.tensors if TensorRole.LOCAL not in t.roles)

    def sent(self, number: int) -> tuple[TensorSpec, ...]:
        """Returns the tensors of an update of round `number` (1, 2, ...)."""
        return tuple(t for t in self.tensors if t.role(number) is TensorRole.SENT)

    @cached_property
    def derived(self) -> tuple[TensorSpec, ...]:
        """The tensors that the server's strategy makes of the changes of others."""
        return tuple(t for t in self.tensors if TensorRole.DERIVED in t.roles)

    def changed(self, have: int, version: int) -> tuple[TensorSpec, ...]:
        """Returns the shared tensors in which two versions can differ: what a round between them sends, or derives.

        After a rollback between them, others may differ too.
        """
        first, last = min(have, version) + 1, max(have, version)
        moving = (TensorRole.SENT, TensorRole.DERIVED)
        return tuple(
            t
            for t in self.shared
            if any(t.role(n) in moving for n in range(first, min(last, first + len(t.roles) - 1) + 1))
        )

    @property
    def parameters(self) -> int:
        """Number of tuned values, local ones included; tensors that no round trains are not tuned."""
        return sum(t.size for t in self.adapter.tensors if any(role.trains for role in t.roles))

    @cached_property
    def largest_update(self) -> int:
        """Number of values in the largest update of a round."""
        return max(sum(t.size for t in self.sent(n)) for n in range(1, self.period + 1))

    @property
    def period(self) -> int:
        """Rounds after which the roles of all tensors repeat; if those are more than 64, the longest list of roles."""
        lengths = [len(t.roles) for t in self.tensors]
        return min(math.lcm(*lengths), max(64, *lengths))

    @cached_property
    def sha256(self) -> str:
        """Digest of the method, names, shapes, roles and sections, hexadecimal."""
        rows = [[t.name, list(t.shape), [str(r) for r in t.roles]] for t in self.tensors]
        beside = [[[s.name, s.divisor, s.encoding] for s in self.sections]] if self.sections else []
        return hashlib.sha256(json.dumps([self.method, rows, *beside]).encode()).hexdigest()


def _check(spec: AdapterSpec) -> None:
    if not spec.method:
        raise SpecInvalid("the adapter spec names no method", (("method", "is empty"),))
    if not 1 <= len(spec.tensors) <= MAX_TENSORS:
        text = f"has {len(spec.tensors)} tensors; 1 to {MAX_TENSORS} are allowed"
        raise SpecInvalid(f"the adapter spec {text}", (("tensors", text),))
    for i, (one, other) in enumerate(pairwise(spec.tensors), 1):
        if one.name >= other.name:
            raise spec_fault(i, "name", other.name, "is not sorted behind the one before it, or occurs twice")
    for i, tensor in enumerate(spec.tensors):
        _check_tensor(i, tensor)
        if tensor.section != ADAPTER:
            _check_section(i, tensor, spec.sections)
    if all(tensor.section != ADAPTER for tensor in spec.tensors):
        raise SpecInvalid("the adapter spec has no tuned tensor", (("tensors", "are all of other sections"),))


def _check_tensor(i: int, tensor: TensorSpec) -> None:
    name = tensor.name
    if not name or len(name.encode()) > MAX_NAME_BYTES or not (name.isascii() and name.isprintable()):
        raise spec_fault(i, "name", repr(name[:80]), f"is not named by 1 to {MAX_NAME_BYTES} printable ASCII bytes")
    if len(tensor.shape) > MAX_DIMENSIONS or any(n < 1 for n in tensor.shape):
        raise spec_fault(
            i, "shape", name, f"has shape {tensor.shape}; at most {MAX_DIMENSIONS} extents, each at least 1"
        )
    if tensor.size > MAX_ELEMENTS:
        raise spec_fault(i, "shape", name, f"has {tensor.size} elements; at most {MAX_ELEMENTS} are allowed")
    if not tensor.roles:
        raise spec_fault(i, "roles", name, "has no role")
    if TensorRole.DERIVED in tensor.roles and set(tensor.roles) != {TensorRole.DERIVED}:
        raise spec_fault(i, "roles", name, "is derived in some rounds only; it must be in every round")
    if {TensorRole.LOCAL, TensorRole.SENT} <= set(tensor.roles):
        text = (
            "is local in one round and sent in another, so each client's own values would be lost; "
            "let it be local or frozen in every round, or sent or frozen"
        )
        raise spec_fault(i, "roles", name, text)


def _check_section(i: int, tensor: TensorSpec, known: tuple[Section, ...]) -> None:
    """Checks a tensor of another section than the adapter."""
    section, name = tensor.section, tensor.name
    if not _SECTION.fullmatch(section.name) or section.name == ADAPTER.name:
        text = "is of a section that is not named by 1 to 32 of lower-case letters, digits and '_', or is 'adapter'"
        raise spec_fault(i, "section", name, text)
    if sum(each.name == section.name for each in known) > 1:
        raise spec_fault(i, "section", name, f"is of section {section.name}, which is declared in two ways")
    if section.divisor is None or not (math.isfinite(section.divisor) and section.divisor > 0):
        text = f"is of section {section.name}, whose divisor is {section.divisor}, not a finite number above 0"
        raise spec_fault(i, "section", name, text)
    codec = None if section.encoding is None or section.encoding not in codecs else codecs.get(section.encoding)
    if codec is None or codec.is_sparse or codec.is_random or codec.is_sum:
        shown = str(section.encoding)[:32]
        text = (
            f"is of section {section.name}, whose encoding is {shown!r}; one is needed that is not sparse, nor random"
        )
        raise spec_fault(i, "section", name, text)
    if not tensor.member or tensor.member == name:
        raise spec_fault(i, "name", name, f"is of section {section.name} and not named {section.name}/MEMBER")
    if TensorRole.LOCAL in tensor.roles:
        raise spec_fault(i, "roles", name, f"is of section {section.name} and local, so it has no place there")


def spec_fault(i: int, field: str, name: str, text: str) -> SpecInvalid:
    """Returns the error for a field of the tensor at index `i` of an adapter spec, with that field's path."""
    return SpecInvalid(f"tensor {name[:80]} {text}", ((f"tensors[{i}].{field}", text),))
