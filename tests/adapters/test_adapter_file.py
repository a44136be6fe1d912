"""Adapter and state files: equal bytes for equal content, opened by anything, refused when they are not right."""

import hashlib
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save_file

from fedpeft.adapters import adapter_file
from fedpeft.adapters.adapter_file import AdapterInfo
from fedpeft.adapters.payload import encode
from fedpeft.adapters.spec import TensorSpec
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.errors import BlobCorrupt, ModelInvalid
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold_tensors

SPECS = (TensorSpec("blocks.0.bias", (6,)), TensorSpec("head.weight", (2, 3)), TensorSpec("scale", ()))
INFO = AdapterInfo("run-1", 3, "bias", "ab" * 32, "vit_tiny", ("katze", "smörgås"), {"rank": "8", "alpha": "16"})


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {s.name: np.asarray(rng.standard_normal(s.shape), np.float32) for s in SPECS}


def written(info: AdapterInfo = INFO) -> bytes:
    stream = io.BytesIO()
    result = adapter_file.write_adapter(stream, info, SPECS, tensors())
    assert result.sha256 == hashlib.sha256(stream.getvalue()).hexdigest()
    assert result.size_bytes == len(stream.getvalue())
    return stream.getvalue()


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(written())
    with adapter_file.open_adapter(path, hashlib.sha256(written()).hexdigest()) as file:
        assert file.info == INFO
        assert list(file) == [s.name for s in SPECS] and len(file) == 3
        for spec in SPECS:
            assert file[spec.name].dtype == np.float32 and file[spec.name].shape == spec.shape
            np.testing.assert_array_equal(file[spec.name], tensors()[spec.name])
        assert "other" not in file


def test_equal_content_is_equal_bytes() -> None:
    turned = replace(INFO, extra={"alpha": "16", "rank": "8"})
    assert written() == written() == written(turned)
    assert written() != written(replace(INFO, version=4))


def test_the_safetensors_package_reads_it() -> None:
    loaded = load(written())
    assert set(loaded) == {s.name for s in SPECS}
    for name, values in tensors().items():
        np.testing.assert_array_equal(loaded[name], values)


@pytest.mark.parametrize("name", ["fedadam", "fedavg", "fedavgm"])
def test_a_fold_is_written_tensor_by_tensor_and_goes_on_from_the_files(name: str, tmp_path: Path) -> None:
    rule, manifest_and_payload = strategy(name, {}), encode(tensors(5), SPECS, "float32")
    sent = [Contribution("c", UpdateFacts(1), manifest_and_payload[0], memoryview(manifest_and_payload[1]))]
    base, state = tensors(1), {}
    expected, kept = base, state
    for number in (1, 2):
        paths = tmp_path / f"adapter-{number}", tmp_path / f"state-{number}"
        memory: dict[str, dict[str, np.ndarray]] = {slot: {} for slot in rule.slots}
        values = {}
        for folded in fold_tensors(sent, SPECS, rule, expected, kept):
            values[folded.spec.name] = folded.values
            for slot, after in folded.state.items():
                memory[slot][folded.spec.name] = after
        expected, kept = values, memory
        with paths[0].open("wb") as a, paths[1].open("wb") as b:
            adapter = adapter_file.adapter_writer(a, replace(INFO, version=number), SPECS)
            states = adapter_file.state_writer(b, replace(INFO, version=number), SPECS, rule.slots, rule.shared_slots)
            for folded in fold_tensors(sent, SPECS, rule, base, state):
                adapter.add(folded.values)
                for slot in rule.slots:
                    states.add(folded.state[slot])
            digests = adapter.finish().sha256, states.finish().sha256
        base = adapter_file.open_adapter(paths[0], digests[0])
        state = adapter_file.slots(adapter_file.open_state(paths[1], digests[1]), rule.slots)
    for spec in SPECS:
        np.testing.assert_array_equal(base[spec.name], expected[spec.name])
        for slot in rule.slots:
            assert set(state[slot]) == {s.name for s in SPECS} and len(state[slot]) == 3
            np.testing.assert_array_equal(state[slot][spec.name], kept[slot][spec.name])


def test_a_writer_wants_what_it_was_promised() -> None:
    writer = adapter_file.adapter_writer(io.BytesIO(), INFO, SPECS)
    with pytest.raises(ModelInvalid, match=r"next tensor is blocks\.0\.bias \(6,\), not one of \(7,\)"):
        writer.add(np.zeros(7, np.float32))
    writer = adapter_file.adapter_writer(io.BytesIO(), INFO, SPECS)
    writer.add(np.zeros(6, np.float32))
    with pytest.raises(ModelInvalid, match=r"ends before tensor head\.weight"):
        writer.finish()


def test_another_digest_is_corruption(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(written()[:-1] + b"x")
    with pytest.raises(BlobCorrupt, match="is recorded"):
        adapter_file.open_adapter(path, hashlib.sha256(written()).hexdigest())
    with pytest.raises(BlobCorrupt, match="cannot read"):
        adapter_file.open_adapter(tmp_path / "missing", "00" * 32)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ModelInvalid, match="cannot read"):
        adapter_file.open_adapter(path)
    metadata = INFO.to_metadata(adapter_file.ADAPTER)
    faults = {
        "metadata says None": ({"a": np.zeros(1, np.float32)}, None),
        "metadata says 'pt'": ({"a": np.zeros(1, np.float32)}, {"format": "pt"}),
        "'fedpeft-adapter' '2'": ({"a": np.zeros(1, np.float32)}, {**metadata, "format_version": "2"}),
        "tensor a is F16, not F32": ({"a": np.zeros(1, np.float16)}, metadata),
        "invalid literal": ({"a": np.zeros(1, np.float32)}, {**metadata, "version": "x"}),
        "is not a file of format": ({"a": np.zeros(1, np.float32)}, {**metadata, "classes": "["}),
    }
    for message, (content, data) in faults.items():
        save_file(content, path, data)
        with pytest.raises(ModelInvalid, match=message):
            adapter_file.open_adapter(path)
    path.write_bytes(written())
    with pytest.raises(ModelInvalid, match="fedpeft-state"):
        adapter_file.open_state(path)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(pickle.dumps(np.ones(3)))
    with pytest.raises(ModelInvalid):
        adapter_file.open_adapter(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 2000), place=st.integers(0, 2000), flip=st.integers(0, 255))
def test_damaged_files_give_clear_errors(tmp_path: Path, cut: int, place: int, flip: int) -> None:
    data = bytearray(written())
    data[place % len(data)] ^= flip
    path = tmp_path / "damaged"
    path.write_bytes(data[: max(0, len(data) - cut)] if cut % 2 else data)
    try:
        with adapter_file.open_adapter(path) as file:
            assert all(values.dtype == np.float32 for values in file.values())
    except ModelInvalid as error:
        assert str(path) in error.message


def test_metadata_are_strings_that_other_tools_can_show() -> None:
    header = json.loads(written()[8 : 8 + int.from_bytes(written()[:8], "little")])
    assert header["__metadata__"]["backbone"] == "ab" * 32
    assert json.loads(header["__metadata__"]["classes"]) == ["katze", "smörgås"]
    assert all(isinstance(v, str) for v in header["__metadata__"].values())
