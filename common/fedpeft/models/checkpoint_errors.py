"""Weights files that cannot be read: each is named as what it is, in words for those who are not programmers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch.serialization import get_unsafe_globals_in_checkpoint

from fedpeft.errors import ModelInvalid
from fedpeft.process.file_formats import kind_of

ZIP, PICKLE = b"PK\x03\x04", b"\x80"
"""First bytes of PyTorch's files, of today and of before 1.6."""
_OF_MODELS = ("torch.nn.", "timm.", "torchvision.", "transformers.", "open_clip.")
_GLOBAL = re.compile(r"GLOBAL ([\w.]+) was not an allowed")


def begins_as_safetensors(head: bytes) -> bool:
    """Returns whether a file begins with the length of a header, and the header's brace."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def not_safetensors(path: Path, head: bytes) -> ModelInvalid:
    """Returns the error for a file that was taken for one of safetensors and could not be read as that."""
    kind = kind_of(head)
    if kind:
        return _unreadable(path, f"it is {kind}")
    if begins_as_safetensors(head):
        return _unreadable(path, "it is a safetensors file whose header is damaged, or whose end is missing")
    return _unreadable(path, "its header is not that of a safetensors file, or its end is missing")


def not_unpickled(path: Path, head: bytes, error: Exception) -> ModelInvalid:
    """Returns the error for a file that torch's unpickler, whose error is given, could not read."""
    return _unreadable(path, _instead(path, head, error))


def _unreadable(path: Path, wrong: str) -> ModelInvalid:
    return ModelInvalid(f"{path} is not a safetensors file or a PyTorch file of plain tensors: {wrong}")


def _instead(path: Path, head: bytes, error: Exception) -> str:
    if head.startswith((PICKLE, ZIP)):
        if "TorchScript" in str(error):
            return "it is a TorchScript archive, which holds code; save model.state_dict() in its place"
        if beyond := _classes(path, error):
            return _of_classes(beyond)
        if head.startswith(ZIP) and not _GLOBAL.search(str(error)):
            return "it is a zip archive that PyTorch did not write, or its end is missing"
        return "it is damaged, or holds more than tensors, which is never loaded because it could run code here"
    kind = kind_of(head)
    if kind == "JSON":
        kind += ", such as the index of a checkpoint in several files or a model's configuration; name the weights"
    return f"it is {kind}" if kind else "its first bytes are those of neither"


def _classes(path: Path, error: Exception) -> list[str]:
    """Returns the names of what a file holds beside tensors and plain values, the one that comes first before all."""
    first = _GLOBAL.findall(str(error))
    try:
        allowed = {"argparse.Namespace", "numpy.dtype"}
        found = [name for name in get_unsafe_globals_in_checkpoint(str(path)) if name not in allowed]
    except Exception:  # it is no archive of torch's; the error names the first
        found = []
    return list(dict.fromkeys([*first, *sorted(name for name in found if not name.startswith("numpy."))]))


def _of_classes(names: list[str]) -> str:
    if any(name.startswith(_OF_MODELS) for name in names):
        return f"it holds a whole model object ({names[0]}), not a state dict; save model.state_dict() in its place"
    return (
        f"it holds more than tensors ({some(names)}), which is never loaded because it could run code here; save the "
        "state dict alone"
    )


def some(names: Iterable[str]) -> str:
    """Returns the first few of some names."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
