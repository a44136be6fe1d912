"""The policy of a site: how its file is read, which rules an offer or a ticket breaks, and what the server is told."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.adapters.payload import check_manifest
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.adapters.updates import prepare
from fedpeft.config import CodecConfig, PrivacyConfig, TrainingConfig
from fedpeft.errors import RefusedByPolicy, SettingsInvalid
from fedpeft.rpc import wire
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import run_pb2
from fedpeft_client.commands.site_status import read_status
from fedpeft_client.egress import message_entries
from fedpeft_client.eligibility.policy_rules import RunDemand, broken
from fedpeft_client.eligibility.rules import Built, Site, reasons_against, reasons_against_ticket
from fedpeft_client.owner.limits import Conditions, forbidden
from fedpeft_client.owner.policy import NO_LIMITS, Policy, find, note_named, noted, opens_at
from fedpeft_client.state.outbox import Pending
from fedpeft_client.state.runs import KnownRun

from ..conftest import tiny_run

SITE = Site(frozenset({"bias", "lora"}), {"cat": 30, "dog": 20, "emu": 10})
RUN = KnownRun.of(tiny_run(rounds={"count": 4}, name="emoji").message())


def policy(**sections: dict[str, Any]) -> Policy:
    return Policy.model_validate(sections)


def keys(rules: Policy, asked: RunDemand) -> list[str]:
    return [each.key for each in broken(rules, asked)]


def test_a_policy_file_is_read_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "policy.toml"
    file.write_text('[runs]\nnames = ["emoji*"]\n\n[training]\nmax_epochs = 2\n[times]\nhours = ["20:00-06:00"]\n')
    rules, found = find(file, tmp_path / "elsewhere")
    assert found == file and rules.training.max_epochs == 2
    assert rules.rules == {"runs.names": ["emoji*"], "training.max_epochs": 2, "times.hours": ["20:00-06:00"]}
    assert Policy.model_validate(rules.model_dump(mode="json", exclude_defaults=True)) == rules, "as the worker gets it"
    assert rules.digest and not NO_LIMITS.digest


def test_the_policy_of_the_page_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "site-owner.md").read_text("utf-8")
    (tmp_path / "policy.toml").write_text(page.split("```toml\n")[1].split("```")[0])
    rules = Policy.read(tmp_path / "policy.toml")
    assert len(rules.rules) == 14 and rules.training.max_epochs == 5 and rules.times.hours == ("18:00-07:00",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[training]\nmax_epoch = 2\n", ":2: training.max_epoch: is not a known key (got 2)"),
        ("\n[trainig]\n", ":2: trainig: is not a known key"),
        ('[training]\nmax_epochs = "2"\n', ":2: training.max_epochs: Input should be a valid integer (got '2')"),
        ("[training]\nmax_epochs = 0\n", ":2: training.max_epochs: Input should be greater than or equal to 1"),
        ('[times]\nhours = ["8-9"]\n', ":2: times.hours.0: '8-9' is not HH:MM-HH:MM"),
        ("[times]\nhours = []\n", ":2: times.hours: names no hours"),
        ('[model]\nweights_folders = ["models"]\n', "'models' is not an absolute path"),
        ('[model]\nfingerprints = ["xyz"]\n', "'xyz' is not a fingerprint"),
        ('[transfer]\nencodings = ["gzip"]\n', "there is no encoding 'gzip'; there are: bfloat16"),
        ("[privacy]\nmechanisms = []\n", ":2: privacy.mechanisms: "),
        ('[privacy]\nmechanisms = ["laplace"]\n', ":2: privacy.mechanisms.0: "),
        ("[model\n", "is not a TOML file"),
    ],
)
def test_a_wrong_policy_stops_the_client_with_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    with pytest.raises(SettingsInvalid) as refusal:
        find(None, tmp_path)
    assert words in refusal.value.message and str(file) in refusal.value.message


def test_a_policy_that_is_named_must_be_there_and_one_in_the_state_directory_is_never_passed_over(
    tmp_path: Path,
) -> None:
    assert find(None, tmp_path) == (NO_LIMITS, None)
    with pytest.raises(SettingsInvalid, match="nothing is done without it"):
        find(tmp_path / "policy.toml", tmp_path)
    (tmp_path / "policy.toml").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SettingsInvalid, match="cannot read"):
        find(None, tmp_path)


@pytest.mark.parametrize(
    ("sections", "key", "told"),
    [
        ({"runs": {"ids": ["run-other"]}}, "runs.ids", "its owner allows only certain runs"),
        ({"runs": {"names": ["letters*"]}}, "runs.names", "its owner allows only certain runs"),
        ({"runs": {"max_rounds": 3}}, "runs.max_rounds", "the server asks for 4 rounds; its owner allows 3"),
        ({"model": {"names": ["vit_small*"]}}, "model.names", "does not allow the model vit_tiny_patch16_224"),
        ({"model": {"fingerprints": ["ab" * 8]}}, "model.fingerprints", "its owner does not allow the run's backbone"),
        ({"model": {"max_image_size": 31}}, "model.max_image_size", "asks for 32 pixels a side; its owner allows 31"),
        ({"peft": {"methods": ["lora"]}}, "peft.methods", "its owner does not allow the PEFT method 'bias'"),
        ({"peft": {"max_parameters": 10}}, "peft.max_parameters", "parameters tuned; its owner allows 10"),
        ({"training": {"max_steps": 2}}, "training.max_steps", "the server asks for 3 steps; its owner allows 2"),
        ({"training": {"max_batch_size": 3}}, "training.max_batch_size", "asks for 4 images in a batch"),
        ({"data": {"min_examples": 61}}, "data.min_examples", "fewer images of the run's classes than its owner wants"),
        (
            {"privacy": {"mechanisms": ["local", "example"]}},
            "privacy.mechanisms",
            "the run has no noise; its owner wants 'local', 'example'",
        ),
        ({"privacy": {"max_epsilon": 5}}, "privacy.max_epsilon", "target_epsilon is not given; its owner allows 5"),
        ({"privacy": {"max_delta": 1e-5}}, "privacy.max_delta", "delta is not given; its owner allows 1e-05"),
        ({"transfer": {"encodings": ["float16"]}}, "transfer.encodings", "does not allow updates as float32"),
        (
            {"transfer": {"max_payload_bytes": 9}},
            "transfer.max_payload_bytes",
            "bytes in an update; its owner allows 9",
        ),
        (
            {"transfer": {"max_bytes_a_day": 9}},
            "transfer.max_bytes_a_day",
            "bytes in the upload of an update; its owner allows 9",
        ),
    ],
)
def test_every_rule_declines_a_run_and_says_which(sections: dict[str, Any], key: str, told: str) -> None:
    (reason,) = reasons_against(RUN, replace(SITE, policy=policy(**sections)))
    assert (
        reason.kind == "REFUSED_BY_POLICY" and told in reason.public_text and isinstance(reason.error, RefusedByPolicy)
    )
    assert key in reason.local_text or key == "data.min_examples"
    assert "60" not in reason.public_text, "how many images there are is private"


def test_a_run_within_every_rule_is_accepted_and_absent_keys_allow() -> None:
    wide = policy(
        runs={"ids": ["run-other"], "names": ["em?ji"], "max_rounds": 4},
        model={"names": ["vit_*"], "fingerprints": [RUN.fingerprint[:16]], "max_image_size": 32, "hub": False},
        peft={"methods": ["bias"], "max_parameters": RUN.spec.parameters},
        training={"max_epochs": 1, "max_steps": 3, "max_batch_size": 4},
        data={"min_examples": 60},
        transfer={"encodings": ["float32"], "max_payload_bytes": RUN.upload_bounds(1)[1]},
    )
    assert reasons_against(RUN, replace(SITE, policy=wide)) == ()
    assert reasons_against(RUN, SITE) == ()


NOISE = {"mechanism": "example", "clip_norm": 1.0, "target_epsilon": 5.0, "delta": 1e-5}
DEMANDED = {"mechanisms": ["local", "example"], "max_epsilon": 5, "max_delta": 1e-5}


@pytest.mark.parametrize(
    ("change", "broken_keys"),
    [
        ({}, []),
        ({"mechanism": "local", "target_epsilon": 0.5}, []),
        ({"mechanism": "central"}, ["privacy.mechanisms"]),
        ({"target_epsilon": 5.1}, ["privacy.max_epsilon"]),
        ({"target_epsilon": None, "noise_multiplier": 100.0}, ["privacy.max_epsilon"]),
        ({"delta": 2e-5}, ["privacy.max_delta"]),
    ],
)
def test_a_run_needs_the_noise_that_the_owner_demands(change: dict[str, Any], broken_keys: list[str]) -> None:
    config = RUN.config.model_copy(update={"privacy": PrivacyConfig.model_validate({**NOISE, **change})})
    run, rules = replace(RUN, config=config), policy(privacy=DEMANDED)
    assert Policy.model_validate(rules.model_dump(mode="json", exclude_defaults=True)) == rules, "as the worker gets it"
    assert keys(rules, RunDemand(run, config.training)) == broken_keys
    assert keys(rules, RunDemand(run, config.training, 1, 60)) == broken_keys, "a ticket is held to the same"


def test_the_size_of_the_input_is_known_once_the_model_is_built() -> None:
    config = RUN.config.model_copy(update={"model": RUN.config.model.model_copy(update={"image_size": None})})
    site = replace(SITE, policy=policy(model={"max_image_size": 100}))
    run = replace(RUN, config=config)
    assert reasons_against(run, site) == ()
    (reason,) = reasons_against(run, replace(site, built=Built(run.spec, run.fingerprint, 224)))
    assert "224 pixels a side" in reason.public_text


@pytest.mark.parametrize(
    ("wanted", "weights", "allowed"),
    [
        ("/srv/models/vit.safetensors", "", True),
        ("/srv/models/deep/vit.safetensors", "", True),
        ("/srv/modelsother/vit.safetensors", "", False),
        ("/srv/models/../../etc/passwd", "", False),
        ("/etc/passwd", "", False),
        ("vit.safetensors", "", False),
        ("/etc/passwd", "folder", True),  # the owner's own folder is looked in, for the name alone
        ("/etc/passwd", "file", True),  # and the owner's own file is taken
        ("none", "", True),
        ("hub", "", False),
        ("hub", "folder", False),
        ("hub", "file", True),
    ],
)
def test_weights_come_from_allowed_places_only(wanted: str, weights: Any, allowed: bool) -> None:
    rules = policy(model={"weights_folders": ["/srv/models"], "hub": False})
    model = RUN.config.model.model_copy(update={"weights": wanted})
    run = replace(RUN, config=RUN.config.model_copy(update={"model": model}))
    reasons = reasons_against(run, replace(SITE, policy=rules, weights=weights))
    assert (reasons == ()) is allowed
    assert not any("/" in reason.public_text for reason in reasons)


def test_one_who_scores_is_not_held_to_the_rules_of_training() -> None:
    rules = policy(training={"max_steps": 1}, transfer={"max_payload_bytes": 1}, privacy={"max_epsilon": 1})
    assert reasons_against(RUN, replace(SITE, policy=rules, trains=False)) == ()


LIMIT = st.none() | st.integers(1, 60)


@given(
    steps=st.none() | st.integers(1, 200),
    epochs=st.none() | st.integers(1, 40),
    batch=st.integers(1, 64),
    examples=st.integers(1, 300),
    most=st.tuples(LIMIT, LIMIT, LIMIT),
)
def test_no_training_passes_that_is_longer_or_larger_than_allowed(
    steps: int | None, epochs: int | None, batch: int, examples: int, most: tuple[int | None, int | None, int | None]
) -> None:
    epochs = None if steps else epochs
    training = TrainingConfig(steps=steps, epochs=epochs, batch_size=batch)
    rules = policy(training=dict(zip(("max_epochs", "max_steps", "max_batch_size"), most, strict=True)))
    a_pass = math.ceil(examples / batch)
    wanted = steps or (epochs or 1) * a_pass
    allowed = {
        "training.max_epochs": most[0] is None or wanted <= most[0] * a_pass,
        "training.max_steps": most[1] is None or wanted <= most[1],
        "training.max_batch_size": most[2] is None or batch <= most[2],
    }
    task = pb.TrainingTask(run=RUN.id, round=1, settings=settings(training))
    asked = RunDemand(RUN, training, 1, examples)
    assert keys(rules, asked) == [key for key, fits in allowed.items() if not fits]
    reasons = reasons_against_ticket(rules, RUN, task, examples, 0)
    assert (reasons == ()) is all(allowed.values()), "a ticket is held to the same"


def settings(training: TrainingConfig) -> run_pb2.TrainingConfig:
    return run_pb2.TrainingConfig(**training.model_dump(exclude_none=True))


@given(number=st.integers(0, 9), taken=st.integers(0, 9), most=st.none() | st.integers(4, 9))
def test_no_ticket_passes_beyond_the_rounds_that_were_offered_or_the_updates_that_are_allowed(
    number: int, taken: int, most: int | None
) -> None:
    rules = NO_LIMITS if most is None else policy(runs={"max_rounds": most})
    task = pb.TrainingTask(run=RUN.id, round=number, settings=settings(RUN.config.training))
    fits = 1 <= number <= 4 and (most is None or taken < most)
    assert (reasons_against_ticket(rules, RUN, task, 60, taken) == ()) is fits


def test_settings_that_are_none_are_refused_in_words_and_not_by_a_crash() -> None:
    task = pb.TrainingTask(run=RUN.id, round=1, settings=run_pb2.TrainingConfig(steps=1, epochs=1, batch_size=4))
    (reason,) = reasons_against_ticket(NO_LIMITS, RUN, task, 60, 0)
    assert reason.kind == "CONFIG_INVALID" and "epochs or steps, not both" in reason.public_text


ROLES = st.sampled_from((TensorRole.SENT, TensorRole.LOCAL)).flatmap(  # no tensor is both in turn
    lambda role: st.lists(st.sampled_from((role, TensorRole.FROZEN)), min_size=1, max_size=4).map(tuple)
)


@given(
    roles=st.lists(ROLES, min_size=1, max_size=5), number=st.integers(1, 4), up=st.sampled_from(["float32", "sparse"])
)
def test_only_tensors_that_the_offer_named_as_sent_ever_leave(
    roles: list[tuple[TensorRole, ...]], number: int, up: str
) -> None:
    spec = AdapterSpec.of("m", [TensorSpec(f"t{k}", (k + 2,), each) for k, each in enumerate(roles)])
    run = replace(RUN, spec=spec, config=RUN.config.model_copy(update={"codec": CodecConfig(up=up)}))
    sent = spec.sent(number)
    if not sent:
        return
    every = {tensor.name: np.ones(tensor.shape, np.float32) for tensor in spec.tensors}
    trained = {**every, "images": np.ones(9, np.float32)}
    kept = {**every, "secret": np.ones(2, np.float32)}
    made = prepare(trained, kept, sent, run.config.codec)
    check_manifest(made.manifest, sent, [run.config.codec.encoding])
    assert [entry.name for entry in made.manifest.entries] == [
        t.name for t in spec.tensors if t.role(number) is TensorRole.SENT
    ]
    assert len(made.payload) == made.manifest.payload_bytes <= run.upload_bounds(number)[1]
    header = pb.UpdateHeader(ticket="t" * 24, manifest=wire.manifest_to_proto(made.manifest), examples=9)
    sent = message_entries.update(Pending(Path(), run.id, number, header, ""), 0).wire_bytes
    assert made.manifest.payload_bytes < sent < message_entries.largest_update(run, number)
    least = policy(transfer={"max_payload_bytes": made.manifest.payload_bytes})
    beyond = keys(least, RunDemand(run, run.config.training, number))
    assert (beyond == []) is (run.upload_bounds(number)[1] <= made.manifest.payload_bytes)


MORNING = datetime(2026, 3, 4, 7, 30)


@given(minutes=st.integers(0, 3 * 24 * 60), begin=st.integers(0, 1439), length=st.integers(1, 1439))
def test_hours_open_and_close_by_the_clock(minutes: int, begin: int, length: int) -> None:
    now = MORNING + timedelta(minutes=minutes)
    end = (begin + length) % 1440
    hours = f"{begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    since = (now.hour * 60 + now.minute - begin) % 1440
    opens = opens_at((hours,), now)
    assert (opens == now) is (since < length)
    assert opens == now or (opens - now == timedelta(minutes=1440 - since))
    assert (forbidden(policy(times={"hours": [hours]}), Conditions(now)) is None) is (since < length)


@pytest.mark.parametrize(
    ("conditions", "told"),
    [
        (Conditions(MORNING, 49.0), "its battery is below its owner's limit"),
        (Conditions(MORNING, 50.0, 80.0), None),
        (Conditions(MORNING, None, 80.1), "it is hotter than its owner allows"),
        (Conditions(MORNING), None),
    ],
)
def test_a_low_battery_or_a_hot_machine_forbids_work(conditions: Conditions, told: str | None) -> None:
    stop = forbidden(policy(times={"min_battery_percent": 50, "max_temperature_c": 80}), conditions)
    assert (stop.text if stop else None) == told


def test_a_policy_outside_the_state_directory_is_noted_for_status(tmp_path: Path) -> None:
    state, elsewhere = tmp_path / "state", tmp_path / "mine.toml"
    state.mkdir()
    elsewhere.write_text("[training]\nmax_steps = 5\n")
    assert read_status(state).policy is None
    note_named(elsewhere, state)
    assert read_status(state).policy == elsewhere
    elsewhere.unlink()
    assert any(str(elsewhere) in problem for problem in read_status(state).problems)
    (state / "policy.toml").write_text("[training]\nmax_steps = 6\n")
    note_named(state / "policy.toml", state)
    assert read_status(state).policy == state / "policy.toml"
    assert noted(state) is None
