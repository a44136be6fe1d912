"""Adapter files and payloads are read a tensor at a time: neither the arrays nor the pages of all are held at once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedpeft.adapters import adapter_file, payload
from fedpeft.adapters.adapter_file import AdapterInfo
from fedpeft.adapters.payload import Decoded, Tensors
from fedpeft.adapters.spec import TensorSpec
from fedpeft.process.mapped_files import mapped, releaser

MIB = 1024 * 1024
SPECS = [TensorSpec(f"t{i:02}", (MIB // 8, 2)) for i in range(32)]  # 1 MiB each


def values(spec: TensorSpec) -> np.ndarray:
    return np.full(spec.shape, float(spec.name[1:]), np.float32)


@contextmanager
def an_adapter_file(path: Path) -> Iterator[Tensors]:
    with path.open("wb") as stream:
        info = AdapterInfo("run-1", 1, "bias", "ab" * 32, "vit_tiny", ("a",))
        adapter_file.write_adapter(stream, info, SPECS, {spec.name: values(spec) for spec in SPECS})
    with adapter_file.open_adapter(path) as file:
        yield file


@contextmanager
def a_payload(path: Path) -> Iterator[Tensors]:
    with path.open("wb") as stream:
        manifest = payload.write(stream, {spec.name: values(spec) for spec in SPECS}, SPECS, "float32")
    data = mapped(path)
    yield Decoded(manifest, data, releaser(data))


def resident_bytes(path: Path) -> int:
    """Returns how much of a file's mappings is in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:  # ADDRESS-ADDRESS RIGHTS OFFSET DEVICE INODE PATH
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@pytest.mark.parametrize("opened", [an_adapter_file, a_payload])
def test_one_tensor_at_a_time_is_in_memory(opened, tmp_path):
    path = tmp_path / "file"
    with opened(path) as tensors:
        assert list(tensors) == [spec.name for spec in SPECS] and len(tensors) == len(SPECS)
        largest = 0
        tracemalloc.start()
        try:
            for place, spec in enumerate(SPECS):
                assert (tensors[spec.name] == values(spec)).all()
                if place % 8 == 7:  # one look takes milliseconds
                    largest = max(largest, resident_bytes(path))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert 0 < largest < 12 * MIB, "of 32: the system may map 2 MiB for one byte that is read"
    assert peak < 8 * MIB, "a tensor, what it is compared with, and the text of smaps"


@pytest.mark.parametrize("opened", [an_adapter_file, a_payload])
def test_a_tensor_outlives_the_file_and_an_unknown_one_is_a_key_error(opened, tmp_path):
    with opened(tmp_path / "file") as tensors:
        kept = [tensors[spec.name] for spec in SPECS]
        with pytest.raises(KeyError, match="t99"):
            tensors["t99"]
    del tensors
    assert all((array == values(spec)).all() for array, spec in zip(kept, SPECS, strict=True))


def test_tensors_without_values_are_read_from_an_adapter_file(tmp_path):
    specs = [TensorSpec("none", (0, 3)), TensorSpec("one", ()), TensorSpec("no", (0,))]
    path = tmp_path / "file"
    with path.open("wb") as stream:
        info = AdapterInfo("run-1", 1, "bias", "ab" * 32, "vit_tiny", ("a",))
        adapter_file.write_adapter(stream, info, specs, {s.name: np.full(s.shape, 7, np.float32) for s in specs})
    with adapter_file.open_adapter(path) as file:
        assert {name: file[name].shape for name in file} == {spec.name: spec.shape for spec in specs}
        assert file["one"] == 7
