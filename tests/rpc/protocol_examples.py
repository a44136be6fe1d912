"""The worked examples in the protos' comments, read from the protos."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PROTOS = Path(__file__).resolve().parents[2] / "protos" / "fedpeft" / "v1"

_LINE = re.compile(r"^// {5}(\S.*)$")
_ENCODED = re.compile(r"([a-z0-9+]+)(?: with seed (\d+))?: ([^=]+) = ([0-9a-fx ]+)")
_REFUSED = re.compile(r"([a-z0-9+]+) of (\d+), refused: ([0-9a-f ]+) \((.+)\)")


def comment(file: str, above: str) -> list[list[str]]:
    """Returns the indented blocks of the comment above a line of a proto, continued lines put together."""
    lines = (PROTOS / file).read_text(encoding="utf-8").splitlines()
    end = lines.index(above)
    begin = next(i for i in range(end - 1, -1, -1) if not lines[i].startswith("//")) + 1
    blocks: list[list[str]] = [[]]
    for line in lines[begin:end]:
        found = _LINE.match(line)
        if found is None:
            blocks.append([])
        elif found[1].startswith("..."):
            blocks[-1][-1] += found[1].removeprefix("...").lstrip()
        else:
            blocks[-1].append(found[1])
    return [block for block in blocks if block]


def fields(block: list[str]) -> dict[str, str]:
    """Returns the lines `name: text` of a block by name."""
    return dict(line.split(": ", 1) for line in block)


def numbers(text: str) -> list[float]:
    """Returns a list of numbers, where `3 x 0` stands for 0, 0, 0."""
    values: list[float] = []
    for part in text.split(","):
        times, _, value = part.rpartition(" x ")
        values += [float(value)] * int(times or 1)
    return values


def floats(text: str) -> NDArray[np.float32]:
    """Returns a list of numbers, or hexadecimal digits, as float32."""
    if re.fullmatch(r"([0-9a-f]{8} ?)+", text):
        return np.frombuffer(bytes.fromhex(text), "<f4")
    return np.array(numbers(text), np.float32)


def entry_lines() -> list[str]:
    """Returns the lines of all blocks above TensorEntry."""
    return [line for block in comment("tensor.proto", "message TensorEntry {") for line in block]


def encodings() -> list[tuple[str, int, list[float], str]]:
    """Returns (encoding, seed, values, hexadecimal digits) of every encoded example."""
    found = filter(None, map(_ENCODED.fullmatch, entry_lines()))
    return [(m[1], int(m[2] or 0), numbers(m[3]), digits(m[4])) for m in found]


def drawn() -> dict[str, str]:
    """Returns what is said of encodings that draw: the seed of a tensor, and the centroids."""
    said = [line for line in entry_lines() if line.startswith(("seed of tensor", "centroids of"))]
    return fields(said)


def digits(text: str) -> str:
    """Returns hexadecimal digits without blanks, where `3 x 00` stands for 000000."""
    return re.sub(r"(\d+) x ([0-9a-f]+)", lambda m: int(m[1]) * m[2], text).replace(" ", "")


def refusals() -> list[tuple[str, int, str, str]]:
    """Returns (encoding, number of values, hexadecimal digits, why) of every example that is refused."""
    found = filter(None, map(_REFUSED.fullmatch, entry_lines()))
    return [(m[1], int(m[2]), m[3].replace(" ", ""), m[4]) for m in found]


def payload() -> dict[str, str]:
    """Returns the example of a whole payload."""
    return fields(comment("tensor.proto", "message Manifest {")[0])


def feedback() -> dict[str, str]:
    """Returns the example of error feedback."""
    return fields(comment("run.proto", "message CodecConfig {")[0])


def fingerprint() -> dict[str, str]:
    """Returns the example of a fingerprint; its tensors are those whose name begins with `tensor`."""
    return fields(comment("run.proto", "message Run {")[1])


def stored(example: dict[str, str]) -> list[dict[str, object]]:
    """Returns the tensors of a fingerprint's example: name, dtype, shape, data in hexadecimal digits."""
    found = []
    for key, text in example.items():
        if key.startswith("tensor "):
            dtype, shape, data = re.fullmatch(r"(\S+) \[([0-9, ]*)\] ([0-9a-f ]+)", text).groups()  # type: ignore[union-attr]
            extents = [int(extent) for extent in shape.split(", ")]
            found.append({"name": key[7:], "dtype": dtype, "shape": extents, "data": data.replace(" ", "")})
    return found


def section() -> dict[str, str]:
    """Returns the example of a section's fold."""
    return fields(comment("tensor.proto", "message Section {")[0])


def pulls() -> list[tuple[int, int, list[int], str, int]]:
    """Returns (version held, version, positions, hexadecimal digits, bytes) of every example of a partial pull."""
    found = []
    for line in comment("federation_service.proto", "message PullHeader {")[0]:
        parts = re.fullmatch(r"have_version (\d+), version (\d+): ([0-9, ]+) = ([0-9a-f]+), (\d+) bytes", line)
        assert parts is not None, line
        positions = [int(position) for position in parts[3].split(", ")]
        found.append((int(parts[1]), int(parts[2]), positions, parts[4], int(parts[5])))
    return found


def token() -> dict[str, str]:
    """Returns the example of an enrolment token."""
    return fields(comment("access_service.proto", "message CreateTokenResponse {")[0])


def audit() -> dict[str, str]:
    """Returns the example of an entry of the audit log."""
    return fields(comment("access_service.proto", "message AuditEntry {")[0])


def statuses() -> list[list[str]]:
    """Returns the examples of rich statuses: what is said, what is added, the bytes."""
    blocks = comment("federation_service.proto", "service FederationService {")
    return [block for block in blocks if block[-1].startswith("details: ")]
