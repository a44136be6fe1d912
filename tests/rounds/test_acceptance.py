"""The rules for an update, which a server and a simulation share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorRole, TensorSpec
from fedpeft.config import parse_config
from fedpeft.errors import ExamplesInvalid, ManifestInvalid, MetricsInvalid, PayloadInvalid
from fedpeft.rounds.acceptance import check_claims, check_manifest, check_norm
from fedpeft.rounds.tickets import Ticket

CONFIG = parse_config(
    {
        "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]},
        "peft": {"method": "rolora"},
        "privacy": {"clip_norm": 2.0},
    }
)
SENT, FROZEN = TensorRole.SENT, TensorRole.FROZEN
SPEC = AdapterSpec.of("rolora", [TensorSpec("a", (2,), (FROZEN, SENT)), TensorSpec("b", (3,), (SENT, FROZEN))])


def manifest_of(number: int, encoding: str = "float32") -> payload.Manifest:
    sent = SPEC.sent(number)
    return payload.encode({t.name: np.ones(t.shape, np.float32) for t in sent}, sent, encoding)[0]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_round_that_a_ticket_was_issued_in_says_what_is_sent(number: int) -> None:
    ticket = Ticket("ticket-1", "ann", base_version=number - 1)
    assert ticket.issued_in == number
    check_manifest(ticket, manifest_of(number), CONFIG, SPEC)
    with pytest.raises(ManifestInvalid) as caught:
        check_manifest(ticket, manifest_of(number + 1), CONFIG, SPEC)
    assert caught.value.fields[0][0].startswith("manifest.tensors")


@pytest.mark.parametrize(
    ("changed", "error", "text"),
    [
        ({"examples": 0, "declared": None}, ExamplesInvalid, "is 0; at least 1 is needed"),
        ({"examples": 9}, ExamplesInvalid, "is 9; 1 to 8 are allowed, by what the client declared"),
        ({"metrics": {"loss": float("nan")}}, MetricsInvalid, "must be finite"),
        ({"metrics": {f"m{i}": 1.0 for i in range(65)}}, MetricsInvalid, "65 figures"),
    ],
)
def test_wrong_claims_are_refused(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    right: dict[str, Any] = {"examples": 8, "metrics": {"loss": 0.5}, "declared": 8}
    check_claims(**right)
    with pytest.raises(error, match=text):
        check_claims(**(right | changed))


def test_an_encoding_that_is_not_the_runs_is_refused() -> None:
    with pytest.raises(ManifestInvalid, match="float16"):
        check_manifest(Ticket("ticket-1", "ann"), manifest_of(1, "float16"), CONFIG, SPEC)


def test_a_norm_that_no_transform_leaves_is_refused() -> None:
    check_norm(2.0, CONFIG)
    with pytest.raises(PayloadInvalid, match=r"privacy\.clip_norm of this run is 2"):
        check_norm(2.001, CONFIG)
