"""The claims of the FedPEFT paper held against results of the studies beside this file; prints a table (Markdown).

    python experiments/paper/claims.py RESULTS

RESULTS has a folder of results for each study, by the name of its file. Claims are left out whose study is not there,
or lacks a combination that they are about. A figure is a difference in points of accuracy, paired by seed, with its
95 % interval. A claim holds if the whole interval lies on its side of zero, does not if all of it lies on the other,
and else it cannot be told. Claims of a study under way say how many of its seeds they have.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpeft.process.start import to_the_end
from fedpeft.studies.results import CellResult, Estimate, Group, StudyResult, accuracy_within, difference, load_results

PEFT = ("bias", "adapter", "prompt")
Values = dict[int, float]
"""A figure by seed."""


@dataclass(frozen=True)
class Claim:
    """A claim of the paper as a difference that should be positive.

    Attributes:
        study: Name of the study that tells.
        text: The claim.
        figure: Returns the difference from the study's results.
    """

    study: str
    text: str
    figure: Callable[[StudyResult], Estimate | None]


def claims() -> Iterator[Claim]:
    """Yields all claims, in the order of the paper."""
    for method in PEFT:
        yield Claim("communication", f"{method} beats full tuning stopped at the same bytes", _against_stopped(method))
    for method in PEFT:
        for other in ("full 1 client", "full 8 clients", "head all clients"):
            yield Claim("communication", f"{method} beats {other}", _against({"method": method}, {"method": other}))
    for method in PEFT:
        skewed, even = {"distribution": "dirichlet"}, {"distribution": "iid"}
        everyone, few = {"federation": "16 all"}, {"federation": "16 an eighth"}
        yield Claim(
            "stability",
            f"skew costs {method} less than full tuning",
            _costs(method, even | everyone, skewed | everyone),
        )
        yield Claim(
            "stability",
            f"fewer clients a round cost {method} less than full tuning",
            _costs(method, skewed | everyone, skewed | few),
        )
    for method in PEFT:
        for other in ("full", "head"):
            yield Claim("scarce", f"with the fewest examples {method} beats {other}", _scarce(method, other))
    for method in PEFT:
        private = {"privacy": "epsilon 5"}
        yield Claim(
            "privacy", f"privacy costs {method} less than full tuning", _costs(method, {"privacy": "none"}, private)
        )
    for method in ("full", "head", *PEFT):
        yield Claim(
            "pretraining",
            f"{method} is better from pre-trained weights than from random ones",
            _against({"method": method, "pretraining": "supervised"}, {"method": method, "pretraining": "none"}),
        )
    for method in PEFT:
        near, far = {"domain": "cifar10"}, {"domain": "aid"}
        yield Claim("domain", f"data farther away cost {method} less than full tuning", _costs(method, near, far))


def _against(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Callable[[StudyResult], Estimate | None]:
    return lambda study: difference(_accuracy(study, ours), _accuracy(study, theirs))


def _against_stopped(method: str) -> Callable[[StudyResult], Estimate | None]:
    """Compares with full tuning of 8 clients, of which only the versions count that the method's bytes pay for."""

    def figure(study: StudyResult) -> Estimate | None:
        stopped = {}
        bytes_of = {cell.seed: cell.curve[-1].bytes for cell in _cells(study, {"method": method})}
        for cell in _cells(study, {"method": "full 8 clients"}):
            found = accuracy_within(cell.curve, bytes_of.get(cell.seed, 0))
            if found is not None:
                stopped[cell.seed] = found
        return difference(_accuracy(study, {"method": method}), stopped)

    return figure


def _costs(
    method: str, before: Mapping[str, str], after: Mapping[str, str]
) -> Callable[[StudyResult], Estimate | None]:
    """Compares what a change takes from full tuning with what it takes from a method."""

    def lost(study: StudyResult, of: str) -> Values:
        first, then = (_accuracy(study, {"method": of} | dict(points)) for points in (before, after))
        return {seed: first[seed] - then[seed] for seed in first.keys() & then.keys()}

    return lambda study: difference(lost(study, "full"), lost(study, method))


def _scarce(method: str, other: str) -> Callable[[StudyResult], Estimate | None]:
    """Compares at the fewest examples that the study has: how few depends on its scale."""

    def figure(study: StudyResult) -> Estimate | None:
        numbers = [group.points["examples"] for group in study.groups if "examples" in group.points]
        fewest = {"examples": min(numbers, key=int, default="")}
        return _against(fewest | {"method": method}, fewest | {"method": other})(study)

    return figure


def _cells(study: StudyResult, points: Mapping[str, str]) -> tuple[CellResult, ...]:
    """Returns the cells of a combination; none if the study lacks it."""
    return next((group.cells for group in study.groups if group.points == points), ())


def _accuracy(study: StudyResult, points: Mapping[str, str]) -> Values:
    return Group(points, _cells(study, points), 0).by_seed("accuracy")


def verdict(found: Estimate) -> str:
    """Returns the words for a difference that should be positive."""
    if found.half_width is None or abs(found.mean) <= found.half_width:
        return "cannot be told"
    return "holds" if found.mean > 0 else "does not hold"


def main(results: Path) -> None:
    """Prints the table of all claims whose results are there."""
    print("| study | claim | difference, points | |\n|---|---|---|---|")
    studies = {path.name: load_results(path) for path in sorted(results.iterdir()) if (path / "study.json").exists()}
    for claim in claims():
        if (study := studies.get(claim.study)) is None or (found := claim.figure(study)) is None:
            continue
        interval = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
        seeds = len({cell.seed for cell in study.cells})
        fewer = "" if found.count == seeds else f" ({found.count} of {seeds} seeds)"
        print(f"| {claim.study} | {claim.text} | {100 * found.mean:+.1f}{interval}{fewer} | {verdict(found)} |")


if __name__ == "__main__":
    with to_the_end("claims.py"):
        main(Path(sys.argv[1]))
