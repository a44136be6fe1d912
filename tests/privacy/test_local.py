"""Noise of each client's own: its size, what leaves a site beside it, and a budget that no restart gives back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from safetensors.numpy import load_file, save_file

from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.adapters.updates import prepare
from fedpeft.config import CodecConfig, RunConfig, parse_config
from fedpeft.errors import ConfigInvalid, TrainingFailed
from fedpeft.privacy import noise
from fedpeft.privacy.accounting import calibrated, local_epsilon, locally_overspent
from fedpeft.privacy.events import LocallyNoised
from fedpeft.privacy.transforms import LocalNoise, euclidean, transforms_of
from fedpeft.process import durable
from fedpeft.rounds.combinations import check_combination
from fedpeft.rounds.groups import SENT
from fedpeft.rounds.local_job import LocalJob, Version
from fedpeft.rpc import wire
from fedpeft.training.local_budget import LocalBudget
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.state import state_dir
from fedpeft_client.state.outbox import PAYLOAD, Outbox, Outcome
from fedpeft_client.state.state_dir import StateDirectory

BIAS = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
RUN = "run-000000000001"


def run(**sections: Any) -> RunConfig:
    privacy = {"clip_norm": 1.0, "mechanism": "local", "noise_multiplier": 40.0, "delta": 1e-5}
    return parse_config(
        {
            "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]},
            "peft": {"method": "bias"},
            **sections,
            "privacy": {**privacy, **sections.get("privacy", {})},
        }
    )


def on_paper(z: float, updates: int, delta: float = 1e-5) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(z), updates)
    return accountant.get_epsilon(delta)


def test_every_value_has_noise_of_the_size_that_is_accounted_for_and_other_noise_every_time() -> None:
    (noise,) = transforms_of(run(privacy={"noise_multiplier": 3.0, "clip_norm": 0.5}))
    tensors = {"a": np.zeros((400, 250), np.float32), "b": np.zeros(7, np.float32)}
    first, figures = noise.apply(tensors, 0.0)
    assert first["a"].shape == (400, 250) and first["a"].dtype == np.float32
    assert first["a"].std() == pytest.approx(1.5, rel=0.02) and np.abs(first["b"]).max() > 0
    assert figures == {}, "neither its norm nor what it was clipped by says anything of an update"
    again, _ = noise.apply(tensors, 0.0)
    assert not np.array_equal(first["a"], again["a"]) and not tensors["a"].any()
    noise.check(1e9)
    assert noise.event(5) == LocallyNoised(0.5, 3.0, 5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_what_the_noise_is_added_to_is_within_the_bound(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    monkeypatch.setattr(noise, "gaussian", lambda size: np.zeros(size))
    draw = np.random.default_rng(1)
    for bound in (0.7, 1.0, 3.0):
        tensors = {"a": (scale * draw.standard_normal(1000)).astype(np.float32)}
        passed, _ = LocalNoise(bound, 1.0).apply(tensors, 0.0)
        assert euclidean(passed) <= bound


def test_an_update_with_noise_passes_the_encoding_and_leaves_no_residual() -> None:
    codec = CodecConfig(up="float16", error_feedback=False)
    delta = {"head.weight": np.ones((2, 3), np.float32)}
    update = prepare(delta, None, BIAS.sent(1), codec, transforms_of(run()))
    assert update.residual_if_not == {} == update.residual_if_counted and update.figures == {}
    sent = payload.decode(update.manifest, memoryview(update.payload))["head.weight"]
    assert euclidean({"head.weight": sent}) > 10


def test_epsilon_is_that_of_an_accountant_on_paper_for_any_other_data_of_the_client() -> None:
    for z, updates in ((8.0, 1), (30.0, 25)):
        assert local_epsilon(z, updates, 1e-5) == pytest.approx(on_paper(z, updates), abs=1e-9)
    assert local_epsilon(8.0, 0, 1e-5) == 0.0


def test_noise_that_is_worked_out_lasts_for_all_rounds_and_no_more() -> None:
    config = calibrated(run(rounds={"count": 6}, privacy={"noise_multiplier": None, "target_epsilon": 4.0}))
    assert config.privacy is not None and config.privacy.noise_multiplier is not None
    assert on_paper(config.privacy.noise_multiplier, 6) <= 4.0 < on_paper(config.privacy.noise_multiplier - 1e-3, 6)
    assert locally_overspent(config, 5) == ""
    assert "with update 7 of this client epsilon would be 4." in locally_overspent(config, 6)


def test_what_does_not_go_with_noise_of_the_clients_is_refused_by_field() -> None:
    with pytest.raises(ConfigInvalid, match="it would keep the noise") as caught:
        check_combination(run(codec={"up": "sparse"}), BIAS)
    assert caught.value.fields[0][0] == "codec.up"
    with pytest.raises(ConfigInvalid, match="allows no update: the privacy budget") as caught:
        check_combination(run(privacy={"target_epsilon": 0.1}), BIAS)
    assert caught.value.fields[0][0] == "privacy.target_epsilon"
    with pytest.raises(
        ConfigInvalid, match=r"is 0\.125, which is no protection for one of 8 clients: it must"
    ) as caught:
        check_combination(run(privacy={"delta": 0.125, "noise_multiplier": 80.0}, rounds={"clients": 8}), BIAS)
    assert [name for name, _ in caught.value.fields] == ["privacy.delta"]
    with pytest.raises(ConfigInvalid, match="quantile needs mechanism"):
        run(privacy={"quantile": 0.5})
    for strategy in ("fedavg", "median", "fednova"):  # what the server does with the updates is post-processing
        check_combination(run(aggregation={"strategy": strategy}, codec={"up": "int8"}), BIAS)


class Crash(BaseException):
    """Stands for a kill: nothing after it runs."""


def test_a_run_that_comes_back_with_less_noise_is_refused() -> None:
    def of(config: RunConfig, state: Any) -> LocalBudget:
        return LocalBudget.of(
            config, LocalJob("a", 1, 7, config.training, Version(Manifest((), 0, b""), Path("none")), state), 100
        )

    first = of(run(), {})
    assert of(run(), first.state).epsilon == pytest.approx(on_paper(40.0, 2), abs=1e-9)
    with pytest.raises(TrainingFailed, match="noise 40, then 80"):
        of(run(privacy={"noise_multiplier": 80.0}), first.state)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StateDirectory]:
    with StateDirectory(tmp_path) as found:
        yield found


def draft(outbox: Outbox, updates: int) -> pb.UpdateHeader:
    folder = outbox.draft()
    (folder / PAYLOAD).write_bytes(b"abcd")
    save_file({"updates": np.array([updates], np.float32)}, folder / f"{SENT}.safetensors")
    manifest = wire.manifest_to_proto(payload.Manifest((), 4, hashlib.sha256(b"abcd").digest()))
    return pb.UpdateHeader(ticket=f"ticket-{updates}", manifest=manifest, examples=3)


def spent(directory: StateDirectory) -> int:
    file = state_dir.group(directory.run(RUN), SENT)
    return int(load_file(file)["updates"][0]) if file.exists() else 0


@pytest.mark.parametrize("end", [*Outcome, "discarded", "taken back"])
def test_a_budget_is_booked_before_anything_can_be_sent_whatever_becomes_of_it(
    directory: StateDirectory, end: str
) -> None:
    outbox = Outbox(directory, "")
    pending = outbox.commit(RUN, 1, draft(outbox, 1))
    assert spent(directory) == 1
    if end == "discarded":
        outbox.discard()
    else:
        outbox.settle(pending, Outcome.COUNTED if end == "taken back" else Outcome(end))
    if end == "taken back":
        outbox.take_back(RUN)
    assert spent(directory) == 1


def crashing(real: Callable[..., Any], left: list[int]) -> Callable[..., Any]:
    """Returns a function that is a crash once so many calls were made."""

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise Crash
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize("step", range(1, 12))
def test_a_kill_at_any_step_leaves_no_update_that_is_not_booked(
    directory: StateDirectory, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    outbox, left = Outbox(directory, ""), [step]
    header = draft(outbox, 1)
    with monkeypatch.context() as patch:
        for name in ("sync", "move", "write"):
            patch.setattr(durable, name, crashing(getattr(durable, name), left))
        with suppress(Crash):
            outbox.commit(RUN, 1, header)
    again = Outbox(directory, "")
    assert spent(directory) == 1 or again.load() is None
