"""Suitability of a run for a site: each check, the words for the server, and that nothing of the site is in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import PrivacyConfig
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import BackboneMismatch, ModelInvalid
from fedpeft_client.eligibility.rules import Built, Reason, Site, reasons_against
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.worker.survey import survey

from ..conftest import tiny_run, write_images

SITE = Site(frozenset({"bias", "lora"}), {"cat": 300, "dog": 200, "emu": 100, "yeti": 0})


@pytest.fixture(scope="module")
def run() -> KnownRun:
    return KnownRun.of(tiny_run().message())


def only(reasons: tuple[Reason, ...]) -> Reason:
    (reason,) = reasons
    return reason


def test_a_site_that_has_what_the_run_wants_is_suited_before_and_after_the_model_is_built(run: KnownRun) -> None:
    assert reasons_against(run, SITE) == ()
    assert reasons_against(run, replace(SITE, built=Built(run.spec, run.fingerprint), unreadable={"cat": 6})) == ()


def test_data_for_another_task(run: KnownRun) -> None:
    reason = only(reasons_against(run, replace(SITE, task="text")))
    assert reason.kind == "MODEL_INVALID"
    assert reason.public_text == f"the run's model {run.config.model.name} is for images, its data are for text"
    assert "started with --data PATH" in reason.local_text


def test_a_method_that_is_not_here(run: KnownRun) -> None:
    reason = only(reasons_against(run, replace(SITE, methods=frozenset({"lora"}))))
    assert reason.kind == "CONFIG_INVALID" and reason.public_text == "there is no PEFT method 'bias'; there are: lora"


@pytest.mark.parametrize(
    ("changes", "here", "told"),
    [
        ({"classes": {"cat": 1, "secret": 2}}, "'secret' (2 rows)", "1 of its 2 classes is not among the run's"),
        ({"label_map": {"secret": "lynx"}}, "'secret' to 'lynx'", "its label map names a class"),
        ({"classes": {"secret": 2}, "label_map": {"secret": None}}, "drops all 2 rows", "it has no image of"),
    ],
)
def test_labels_that_do_not_fit_are_named_here_and_counted_there(
    run: KnownRun, changes: dict[str, dict[str, int]], here: str, told: str
) -> None:
    reason = only(reasons_against(run, replace(SITE, **changes)))
    assert reason.kind == "DATA_INVALID" and here in reason.local_text and told in reason.public_text
    assert "secret" not in reason.public_text


def test_a_delta_that_protects_none_of_its_examples(run: KnownRun) -> None:
    def private(delta: float, mechanism: str = "example") -> KnownRun:
        noise = {"mechanism": mechanism, "clip_norm": 1.0, "noise_multiplier": 1.5, "delta": delta}
        return replace(run, config=run.config.model_copy(update={"privacy": PrivacyConfig.model_validate(noise)}))

    reason = only(reasons_against(private(1 / 600), SITE))
    assert reason.kind == "CONFIG_INVALID"
    assert "privacy.delta is 0.00166667, which is no protection for one of 600 examples: it must" in reason.local_text
    assert reason.public_text.endswith("one of its examples: it must be far below 1 / their number")
    assert reasons_against(private(1 / 601), SITE) == ()
    assert reasons_against(private(1 / 600), replace(SITE, label_map={"cat": None})) == (), "only the run's count"
    assert reasons_against(private(1 / 600), replace(SITE, trains=False)) == (), "one who scores spends nothing"
    assert reasons_against(private(1 / 600, "local"), SITE) == (), "its unit is a client"


def test_more_unreadable_images_than_training_takes_speak_against_a_run(run: KnownRun) -> None:
    reason = only(reasons_against(run, replace(SITE, unreadable={"cat": 5, "dog": 2})))
    assert reason.public_text == reason.local_text == "7 of 600 images cannot be read, more than 1%"
    dropped = replace(SITE, unreadable={"yeti": 50}, classes={**SITE.classes, "yeti": 50}, label_map={"yeti": None})
    assert reasons_against(run, dropped) == (), "images that the run does not use do not count"


def test_what_was_built_is_compared_with_the_run(run: KnownRun) -> None:
    other = only(reasons_against(run, replace(SITE, built=Built(run.spec, "ab" * 32))))
    assert isinstance(other.error, BackboneMismatch)
    assert all("ab" * 32 in text and run.fingerprint in text for text in (other.public_text, other.local_text))
    spec = AdapterSpec.of("bias", [TensorSpec("zebra", (1,)), *run.spec.tensors])
    assert "zebra" in only(reasons_against(run, replace(SITE, built=Built(spec, run.fingerprint)))).public_text
    failed = only(reasons_against(run, replace(SITE, built=ModelInvalid("/home/eve/w.pt is no file"))))
    assert failed.kind == "MODEL_INVALID" and "/home/eve" in failed.local_text and "/home" not in failed.public_text


def test_every_reason_is_given_at_once(run: KnownRun) -> None:
    site = Site(frozenset(), {"wolf": 3}, unreadable={})
    assert [reason.kind for reason in reasons_against(run, site)] == ["CONFIG_INVALID", "DATA_INVALID"]


def test_a_survey_opens_every_image_and_names_those_that_cannot_be_read(tmp_path: Path) -> None:
    path = write_images(tmp_path / "images.parquet", count=600)
    table = pq.read_table(path).to_pydict()
    for row in (3, 500):
        table["image"][row]["bytes"] = table["image"][row]["bytes"][:60]
    pq.write_table(pa.table(table), path)
    told: list[dict[str, int]] = []
    found = survey(open_source(path), told.append)
    assert [name.rpartition(" ")[2] for name, _ in found.unreadable] == ["(3.png)", "(500.png)"]
    assert found.by_class == {"cat": 1, "emu": 1}
    assert [t["images"] for t in told] == [256, 512, 600] and told[-1] == {"images": 600, "of": 600, "unreadable": 2}


def test_a_survey_finds_the_bits_in_use_and_follows_the_limit_of_pixels(tmp_path: Path) -> None:
    for k in range(3):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), 4095 >> k, np.uint16)).save(tmp_path / "cat" / f"{k}.png")
    source = open_source(tmp_path)
    assert survey(source, lambda _: None).bits == 12
    found = survey(source, lambda _: None, max_pixels=63)
    assert len(found.unreadable) == 3
    assert "8 x 8 pixels, more than 63 pixels; --max-image-pixels raises the limit" in found.unreadable[0][1]
