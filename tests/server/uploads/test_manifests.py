"""The checker of manifests: its cache takes no wrong one for right, and is bounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedpeft.adapters import payload
from fedpeft.errors import ManifestInvalid
from fedpeft.rounds.tickets import Ticket
from fedpeft.rpc.wire import manifest_to_proto
from fedpeft.v1 import tensor_pb2
from fedpeft_server.uploads import manifests
from fedpeft_server.uploads.manifests import ManifestChecker

from ..rows import CONFIG, SPEC, run_row

TICKET = Ticket("t1", "a")


def message(value: float = 1.0) -> tensor_pb2.Manifest:
    values = {tensor.name: np.full(tensor.shape, value, np.float32) for tensor in SPEC.sent(1)}
    return manifest_to_proto(payload.encode(values, SPEC.sent(1), CONFIG.codec.encoding)[0])


def test_one_that_is_like_another_has_its_own_digest() -> None:
    checker, run, other = ManifestChecker(), run_row(), message(2.0)
    first, second = checker.check(run, TICKET, message()), checker.check(run, TICKET, other)
    assert second == replace(first, sha256=other.sha256) != first


@pytest.mark.parametrize("field", ["shape", "sha256"])
def test_a_wrong_one_is_refused_after_a_right_one(field: str) -> None:
    checker, run, wrong = ManifestChecker(), run_row(), message()
    checker.check(run, TICKET, message())
    if field == "sha256":
        wrong.sha256 = wrong.sha256[:-1]
    else:
        wrong.tensors[0].shape[0] += 1
    with pytest.raises(ManifestInvalid):
        checker.check(run, TICKET, wrong)


def test_the_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[str] = []
    check = manifests.acceptance.check_manifest

    def counted(ticket: Ticket, *rest: object) -> None:
        checks.append(ticket.id)
        check(ticket, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(manifests, "MOST_CACHED", 2)
    monkeypatch.setattr(manifests.acceptance, "check_manifest", counted)
    checker = ManifestChecker()
    for run in "aabcba":
        checker.check(run_row(run), TICKET, message())
    assert len(checks) == 4, "of the first three runs once each, and once more of the one that was dropped"
