"""A rank of the client's own, where the strategy of a run takes it and where not: what is said, and what is sent."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from fedpeft.process import logs
from fedpeft_client.commands.dry_run import _describe
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.worker.verdicts import Verdict, Verdicts

from ..conftest import tiny_run

REPORT = {"examples": 3, "classes": {"cat": 3}, "dropped": 0, "model_parameters": 1000}


class Worker:
    """Finds no fault with any run."""

    async def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"reasons": [], "report": REPORT}


def known(strategy: str, method: str = "lora") -> KnownRun:
    peft = {"method": method, **({"rank": 8} if method == "lora" else {})}
    made = tiny_run(method, aggregation={"strategy": strategy}, codec={"error_feedback": False}, peft=peft)
    return KnownRun.of(made.message())


@pytest.fixture(scope="module")
def runs() -> dict[str, KnownRun]:
    return {"fedavg": known("fedavg"), "flexlora": known("flexlora"), "bias": known("fedavg", "bias")}


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        ("fedavg", 2, "its strategy 'fedavg' takes updates of rank 8 only"),
        ("fedavg", 8, ""),
        ("fedavg", None, ""),
        ("flexlora", 2, ""),
        ("bias", 2, ""),
    ],
)
async def test_a_rank_without_effect_is_said_once_a_run(
    runs: dict[str, KnownRun], name: str, rank: int | None, said: str
) -> None:
    with capture_logs() as lines:
        verdicts = Verdicts(Worker(), logs.logger(), rank)  # type: ignore[arg-type]
        for _ in range(2):
            assert (await verdicts.judge(runs[name].message)).is_eligible
    warned = [line for line in lines if line["log_level"] == "warning"]
    assert [(line["event"], line["rank"], line["cause"]) for line in warned] == (
        [("--rank has no effect on this run", rank, said)] if said else []
    )


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        ("fedavg", 2, "8, the run's: its strategy 'fedavg' takes updates of rank 8 only, so --rank 2 has no effect"),
        ("flexlora", 2, "2 of the run's 8"),
        ("flexlora", 16, "8, the run's"),
        ("flexlora", None, None),
        ("bias", 2, None),
    ],
)
def test_a_dry_run_says_the_rank_and_the_size_of_an_update_of_it(
    runs: dict[str, KnownRun], capsys: pytest.CaptureFixture[str], name: str, rank: int | None, said: str | None
) -> None:
    run = runs[name]
    _describe(Verdict((), run, REPORT, "tiny"), rank, evaluates=False)
    lines = dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines.get("rank") == said
    factors = sum(tensor.size for tensor in run.spec.tensors if "lora_" in tensor.name)
    beside = run.spec.parameters - factors
    of_it = rank / 8 if name == "flexlora" and rank == 2 else 1
    assert f"send {4 * (beside + round(factors * of_it)):,} bytes (float32)" in lines["would"]
    _describe(Verdict((), run, REPORT, "tiny"), rank, evaluates=True)
    assert "rank" not in dict(line.strip().split("  ", 1) for line in capsys.readouterr().out.splitlines())
