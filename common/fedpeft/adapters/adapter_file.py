"""Adapter versions and server state at rest: safetensors files with metadata, which anything in the ecosystem opens.

Written here rather than with the safetensors package for two reasons: a file can be written tensor by tensor as the
fold yields them, and equal content is equal bytes (the package writes metadata in a random order). The package checks
the layout of what is read; the tensors are copied from a mapping whose pages are given back, because with the package's
own a file that was read counts as the process's memory until it is closed. Neither way is anything unpickled.

An adapter file holds the tensors of a version by name, float32. A state file holds the strategy's state as SLOT/NAME,
float64, flat.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fedpeft.adapters.payload import RESIDENT_BYTES, Tensors
from fedpeft.adapters.spec import TensorSpec
from fedpeft.errors import BlobCorrupt, ModelInvalid
from fedpeft.process.mapped_files import mapped, releaser

SECTIONS = "sections"
"""Key of `AdapterInfo.extra`: names of the sections beside the adapter, a JSON list; absent if there are none."""

ADAPTER, STATE = "fedpeft-adapter", "fedpeft-state"
FORMAT_VERSION = "1"

_DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {ADAPTER: ("F32", np.dtype("<f4")), STATE: ("F64", np.dtype("<f8"))}
_ALIGNMENT_BYTES = 8


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """Metadata of a file.

    Attributes:
        run: Id of the run.
        version: Adapter version: 0 as created, r the result of round r.
        method: Registered name of the PEFT method.
        backbone: Fingerprint of the frozen tensors, hexadecimal.
        model: timm's name of the model.
        classes: Class names in the order of the logits.
        extra: Anything else worth keeping, such as the run file.
    """

    run: str
    version: int
    method: str
    backbone: str
    model: str
    classes: tuple[str, ...]
    extra: Mapping[str, str] = field(default_factory=dict)

    def to_metadata(self, kind: str) -> dict[str, str]:
        """Returns the metadata of a file of `kind` (ADAPTER or STATE): strings, as safetensors wants."""
        return {
            "format": kind,
            "format_version": FORMAT_VERSION,
            "run": self.run,
            "version": str(self.version),
            "method": self.method,
            "backbone": self.backbone,
            "model": self.model,
            "classes": json.dumps(self.classes),
            "extra": json.dumps(dict(self.extra), sort_keys=True),
        }

    @classmethod
    def from_metadata(cls, data: Mapping[str, str]) -> Self:
        """Reads what `to_metadata` wrote; raises KeyError or ValueError for anything else."""
        return cls(
            run=data["run"],
            version=int(data["version"]),
            method=data["method"],
            backbone=data["backbone"],
            model=data["model"],
            classes=tuple(map(str, json.loads(data["classes"]))),
            extra={str(k): str(v) for k, v in dict(json.loads(data["extra"])).items()},
        )


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file: its digest (hexadecimal) and size."""

    sha256: str
    size_bytes: int


class TensorWriter:
    """Writes one file, a tensor after the other.

    Args:
        stream: Target; only `write` is called, nothing is flushed or closed.
        kind: ADAPTER or STATE.
        info: The file's metadata.
        shapes: Every tensor's name and shape, in the order in which they will be added.
    """

    def __init__(self, stream: BinaryIO, kind: str, info: AdapterInfo, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._size_bytes = 0
        self._dtype = _DTYPES[kind][1]
        self._awaited = list(reversed(list(shapes.items())))
        self._write(_header(kind, info, shapes))

    def add(self, values: NDArray[Any]) -> None:
        """Writes the next tensor, of the shape that was announced.

        Raises:
            ModelInvalid: If no tensor is awaited, or one of another shape.
        """
        name, shape = self._awaited.pop() if self._awaited else ("none", None)
        if values.shape != shape:
            raise ModelInvalid(f"the file's next tensor is {name} {shape}, not one of {values.shape}")
        flat = np.ascontiguousarray(values, self._dtype).reshape(-1)
        self._write(flat.view(np.uint8).data)

    def finish(self) -> Written:
        """Returns the file's digest and size.

        Raises:
            ModelInvalid: If tensors are missing.
        """
        if self._awaited:
            raise ModelInvalid(f"the file ends before tensor {self._awaited[-1][0]}")
        return Written(self._hash.hexdigest(), self._size_bytes)

    def _write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self._size_bytes += len(data)


def _header(kind: str, info: AdapterInfo, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    code, dtype = _DTYPES[kind]
    header: dict[str, Any] = {"__metadata__": info.to_metadata(kind)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    return len(text).to_bytes(8, "little") + text


def adapter_writer(stream: BinaryIO, info: AdapterInfo, specs: Sequence[TensorSpec]) -> TensorWriter:
    """Returns a writer of an adapter file; add the tensors in the order of `specs`."""
    return TensorWriter(stream, ADAPTER, info, {spec.name: spec.shape for spec in specs})


def state_writer(
    stream: BinaryIO, info: AdapterInfo, specs: Sequence[TensorSpec], slots: Sequence[str], shared: AbstractSet[str]
) -> TensorWriter:
    """Returns a writer of a state file; for each of `specs`, add the slots in their order, of a shared one 1 value."""
    shapes = {f"{slot}/{spec.name}": (1,) if slot in shared else (spec.size,) for spec in specs for slot in slots}
    return TensorWriter(stream, STATE, info, shapes)


def write_adapter(stream: BinaryIO, info: AdapterInfo, specs: Sequence[TensorSpec], tensors: Tensors) -> Written:
    """Writes an adapter file whole.

    Raises:
        ModelInvalid: If a tensor has not its spec's shape.
    """
    writer = adapter_writer(stream, info, specs)
    for spec in specs:
        writer.add(tensors[spec.name])
    return writer.finish()


class TensorFile(Mapping[str, NDArray[Any]]):
    """The tensors of a file by name, read when asked for, so that one at a time is in memory.

    Closes with its context. `info` is what the file says about itself.

    Args:
        path: The file.
        kind: ADAPTER or STATE.
        sha256: The digest it must have, hexadecimal; None: any.

    Raises:
        BlobCorrupt: If a digest was given, and the file is missing or has another.
        ModelInvalid: If the file cannot be read, or is not one of `kind`.
    """

    def __init__(self, path: Path, kind: str, sha256: str | None = None) -> None:
        if sha256 is not None:
            check_digest(path, sha256)
        try:
            opened: Any = safe_open(path, framework="numpy")  # its stubs are half typed
            with opened as file:
                self._shapes, self.info = _layout(file, kind)
            self._data = mapped(path)
        except OSError as error:
            raise ModelInvalid(f"cannot read {path}: {error.strerror or error}") from None
        except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelInvalid(f"{path} is not a file of format {kind}: {error}") from None

        self._dtype = _DTYPES[kind][1]
        sizes = (self._dtype.itemsize * math.prod(shape) for shape in self._shapes.values())
        starts = accumulate(sizes, initial=8 + int.from_bytes(self._data[:8], "little"))
        self._starts = dict(zip(self._shapes, starts, strict=False))
        self._resident = 0

    def adapter(self) -> dict[str, NDArray[Any]]:
        """Returns the tensors without those of other sections than the adapter."""
        others = tuple(f"{section}/" for section in json.loads(self.info.extra.get(SECTIONS, "[]")))
        return {name: self[name] for name in self if not name.startswith(others)}

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self._shapes:
            raise KeyError(name)
        values: NDArray[Any] = np.ndarray(self._shapes[name], self._dtype, self._data, self._starts[name]).copy()
        self._resident += values.nbytes
        if self._resident > RESIDENT_BYTES and (release := releaser(self._data)):
            release()
            self._resident = 0
        return values

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._data = memoryview(b"")  # unmaps the file


def _layout(file: Any, kind: str) -> tuple[dict[str, tuple[int, ...]], AdapterInfo]:
    """Returns the shapes of the tensors in the order of their bytes, which leave no gap, and what the file says."""
    found = file.metadata() or {}
    said = found.get("format"), found.get("format_version")
    if said != (kind, FORMAT_VERSION):
        raise ValueError(f"its metadata says {said[0]!r} {said[1]!r}, not {kind!r} {FORMAT_VERSION!r}")
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    for name, part in slices.items():
        if part.get_dtype() != _DTYPES[kind][0]:
            raise ValueError(f"tensor {name} is {part.get_dtype()}, not {_DTYPES[kind][0]}")
    return {name: tuple(part.get_shape()) for name, part in slices.items()}, AdapterInfo.from_metadata(found)


def open_adapter(path: Path, sha256: str | None = None) -> TensorFile:
    """Opens an adapter file: float32 arrays by name; raises as `TensorFile`."""
    return TensorFile(path, ADAPTER, sha256)


def open_state(path: Path, sha256: str | None = None) -> TensorFile:
    """Opens a state file: flat float64 arrays by SLOT/NAME; raises as `TensorFile`."""
    return TensorFile(path, STATE, sha256)


class Slot(Mapping[str, NDArray[np.float64]]):
    """One slot of a state file by tensor name, read when asked for: what `fedpeft.rounds.folding.fold` takes."""

    def __init__(self, file: TensorFile, slot: str) -> None:
        self._file = file
        self._prefix = f"{slot}/"

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self._file[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._file if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def slots(file: TensorFile, names: Iterable[str]) -> dict[str, Slot]:
    """Returns the state in a file as the fold takes it."""
    return {name: Slot(file, name) for name in names}


def data_sha256(path: Path) -> bytes:
    """Returns the digest of a file's tensors without what it says about itself: that of them as a float32 payload."""
    with path.open("rb") as stream:
        stream.seek(data_start(stream))
        return hashlib.file_digest(stream, "sha256").digest()


def data_start(stream: BinaryIO) -> int:
    """Returns the offset in bytes at which the tensors of a file begin, given the file at its beginning."""
    return 8 + int.from_bytes(stream.read(8), "little")


def check_digest(path: Path, sha256: str) -> None:
    """Checks that a file has its recorded digest.

    Raises:
        BlobCorrupt: If it has not, or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise BlobCorrupt(f"cannot read {path}: {error.strerror or error}") from None
    if found != sha256:
        raise BlobCorrupt(f"{path} has sha256 {found}; {sha256} is recorded")
