"""Mapped files: no descriptor is held, so that the limit on open files bounds no round, and pages are given back."""

from __future__ import annotations

import gc
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.spec import TensorSpec
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.process.mapped_files import mapped, releaser
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold

SPECS = (TensorSpec("a", (40, 50)), TensorSpec("b", (3,)))


@contextmanager
def open_files(spare: int) -> Iterator[None]:
    """Allows this process so many open files more than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1 + spare, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def mappings_of(path: Path) -> int:
    return sum(line.endswith(str(path)) for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_mapping_holds_no_descriptor_and_goes_with_its_last_view(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    before = len(os.listdir("/proc/self/fd"))
    view = mapped(path)
    values = np.frombuffer(view[256:512], np.uint8)
    assert len(os.listdir("/proc/self/fd")) == before
    assert view.readonly and bytes(view) == path.read_bytes()
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1
    del view
    path.unlink()
    assert values.tolist() == list(range(256)), "a file that was removed can be read as long as it is mapped"
    gone = Path(f"{path} (deleted)")
    assert mappings_of(gone) == 1
    del values
    gc.collect()
    assert mappings_of(gone) == 0


def test_pages_that_were_given_back_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(100_000))
    view = mapped(path)
    release = releaser(view)
    assert release is not None
    first = bytes(view)
    release()
    assert bytes(view) == first == path.read_bytes()
    assert releaser(memoryview(first)) is None


def test_an_empty_file_and_none(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert bytes(mapped(tmp_path / "empty")) == b""
    with pytest.raises(FileNotFoundError):
        mapped(tmp_path / "none")
    with pytest.raises(OSError):
        mapped(tmp_path)


@pytest.mark.parametrize("encoding", ["float32", "sparse+float16"])
def test_a_round_may_have_more_updates_than_files_may_be_open(tmp_path: Path, encoding: str) -> None:
    rng, inputs = np.random.default_rng(0), []
    for number in range(300):
        tensors = {spec.name: rng.normal(size=spec.shape).astype(np.float32) for spec in SPECS}
        manifest, data = payload.encode(tensors, SPECS, encoding)
        (tmp_path / str(number)).write_bytes(data)
        inputs.append((f"client-{number:03}", manifest, data))
    base, rule = {spec.name: np.zeros(spec.shape, np.float32) for spec in SPECS}, strategy("fedavg", {})
    held = [Contribution(client, UpdateFacts(10), manifest, memoryview(data)) for client, manifest, data in inputs]
    with open_files(20):
        views = [mapped(tmp_path / str(number)) for number in range(len(inputs))]
        read = [
            Contribution(client, UpdateFacts(10), manifest, view, releaser(view))
            for (client, manifest, _), view in zip(inputs, views, strict=True)
        ]
        found = fold(read, SPECS, rule, base, {})
    wanted = fold(held, SPECS, rule, base, {})
    assert {n: v.tobytes() for n, v in found.adapter.items()} == {n: v.tobytes() for n, v in wanted.adapter.items()}
