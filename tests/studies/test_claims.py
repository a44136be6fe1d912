"""The table of claims compares what it says, by seed, and says no more than the interval allows."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from fedpeft.studies.results import CellResult, Estimate, StudyResult

ABOUT = {"name": "", "title": "", "question": "", "target": None, "budgets_bytes": [], "axes": {}}
FILE = Path(__file__).parents[2] / "experiments" / "paper" / "claims.py"


@pytest.fixture
def claims(monkeypatch):
    spec = importlib.util.spec_from_file_location("tested_claims", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def cell(points: dict[str, str], seed: int, accuracies: list[float], bytes_each: int = 10) -> CellResult:
    rows = [
        {
            "version": number,
            "payload_bytes_up": bytes_each,
            "payload_bytes_down": 0,
            "seconds": 1.0,
            "metrics": {"accuracy": accuracy},
        }
        for number, accuracy in enumerate(accuracies, 1)
    ]
    return CellResult(f"{points}{seed}", points, seed, "", {"initial_metrics": {"accuracy": 0.1}, "rounds": rows}, "")


def study(cells: list[CellResult]) -> StudyResult:
    return StudyResult(Path("made"), {}, tuple(cells))


def figure(claims, text: str):
    (found,) = [claim.figure for claim in claims.claims() if claim.text == text]
    return found


def test_full_tuning_counts_up_to_the_methods_bytes(claims):
    made = study(
        [cell({"method": "bias"}, 0, [0.4, 0.6], 10), cell({"method": "full 8 clients"}, 0, [0.3, 0.5, 0.9], 10)]
    )
    found = figure(claims, "bias beats full tuning stopped at the same bytes")(made)
    assert found == Estimate(pytest.approx(0.1), None, 1), "0.6 beside 0.5, whose 20 bytes it has, and not 0.9"


def test_a_cost_is_the_loss_of_full_tuning_less_that_of_the_method(claims):
    accuracies = {("full", "cifar10"): 0.8, ("full", "aid"): 0.5, ("bias", "cifar10"): 0.7, ("bias", "aid"): 0.6}
    made = study([cell({"method": m, "domain": d}, 3, [value]) for (m, d), value in accuracies.items()])
    assert figure(claims, "data farther away cost bias less than full tuning")(made).mean == pytest.approx(0.3 - 0.1)


def test_a_seed_that_only_one_side_has_counts_nothing(claims):
    points = {"examples": "500"}
    made = study(
        [
            cell(points | {"method": "bias"}, 0, [0.5]),
            cell(points | {"method": "bias"}, 1, [0.9]),
            cell(points | {"method": "head"}, 0, [0.2]),
        ]
    )
    assert figure(claims, "with the fewest examples bias beats head")(made) == Estimate(pytest.approx(0.3), None, 1)


def test_claims_of_scarce_data_are_about_the_fewest_examples_that_the_study_has(claims):
    made = study(
        [
            cell({"method": method, "examples": examples}, 0, [accuracy])
            for examples, values in {"10000": (0.2, 0.1), "1000": (0.9, 0.5)}.items()
            for method, accuracy in zip(("bias", "head"), values, strict=True)
        ]
    )
    assert figure(claims, "with the fewest examples bias beats head")(made).mean == pytest.approx(0.4)


def test_a_claim_whose_combinations_the_study_lacks_has_no_figure(claims):
    made = study([cell({"method": "bias"}, 0, [0.4])])
    assert {claim.figure(made) for claim in claims.claims()} == {None}
    assert {claim.figure(study([])) for claim in claims.claims()} == {None}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Estimate(0.1, 0.05, 3), "holds"),
        (Estimate(-0.1, 0.05, 3), "does not hold"),
        (Estimate(0.1, 0.2, 3), "cannot be told"),
        (Estimate(0.1, None, 1), "cannot be told"),
    ],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(claims, found, words):
    assert claims.verdict(found) == words


def test_a_claim_with_fewer_seeds_than_its_study_says_so(claims, tmp_path, capsys):
    rows = []
    for method, accuracy in (("bias", 0.5), ("full", 0.25), ("head", 0.75)):
        for seed in range(3):
            points = {"method": method, "examples": "500"}
            rows.append({"key": f"{method}{seed}", "points": points, "seed": seed, "label": ""})
            if (method, seed) != ("head", 2):
                place = tmp_path / "scarce" / "cells" / f"{method}{seed}"
                place.mkdir(parents=True)
                (place / "report.json").write_text(json.dumps(cell(points, seed, [accuracy]).report))
    for method in ("adapter", "prompt"):
        rows.append({"key": method, "points": {"method": method, "examples": "500"}, "seed": 0, "label": ""})
    (tmp_path / "scarce" / "study.json").write_text(json.dumps({**ABOUT, "cells": rows}))
    claims.main(tmp_path)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| scarce | with the fewest examples bias beats full | +25.0 ± 0.0 | holds |",
        "| scarce | with the fewest examples bias beats head | -25.0 ± 0.0 (2 of 3 seeds) | does not hold |",
    ]
