"""Parts that are installed beside fedpeft: what they say of themselves decides what goes with them, not their names."""

from __future__ import annotations

from pathlib import Path

from .installed import LINE, install, run

PARTS = """
import numpy as np
from fedpeft.aggregation import Strategy
from fedpeft.codecs.dense import Dense
from fedpeft.codecs.sparse import Sparse
from fedpeft.rounds.policies import RoundPolicy


class Float64(Dense):
    def narrow(self, values):
        return values.astype("<f8").view(self.bits)

    def widen(self, bits):
        return bits.view("<f8").astype(np.float32)


FLOAT64 = Float64("float64", "<u8", 0x7FF0_0000_0000_0000)
SPARSE = Sparse(FLOAT64)
GAPS = Sparse(FLOAT64)
GAPS.name = "gaps"


class Capped(Strategy):  # of a weighted mean, as FedAvg
    def weigh(self, facts):
        return float(min(facts.examples, 10))

    def step(self, x, delta, state):
        return x + delta, {}


class Summed(Capped):  # its Delta is no mean
    def divisor(self, cohort, weights):
        return 1.0


class Stepwise(Capped):
    normalises_by_steps = True


class Picky(Capped):
    def misfit(self, config, spec):
        return ("rounds.count", "is more than one") if config.rounds.count > 1 else None


class Everybody(RoundPolicy):
    def wanted(self, state, config, now):
        return 1000


class Drifting(Everybody):
    one_version = False
    settings = frozenset({"concurrency"})

    def misfit(self, config, spec):
        return ("rounds.clients", "must be two") if config.rounds.clients != 2 else None


EVERYBODY, DRIFTING = Everybody(), Drifting()
"""
POINTS = """
[fedpeft.codecs]
float64 = parts:FLOAT64
sparse+float64 = parts:SPARSE
gaps = parts:GAPS
[fedpeft.strategies]
capped = parts:Capped
summed = parts:Summed
stepwise = parts:Stepwise
picky = parts:Picky
[fedpeft.policies]
everybody = parts:EVERYBODY
drifting = parts:DRIFTING
"""
COMBINED = """
import json
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.rounds.combinations import check_combination

spec = AdapterSpec.of("bias", [TensorSpec("head.weight", (2, 3))])
SCAFFOLD = {"momentum": 0.0, "algorithm": {"name": "scaffold", "population": 9}}
PROX = {"algorithm": {"name": "fedprox"}}


def faults(**sections):
    run = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "bias"}}
    try:
        check_combination(parse_config({**run, "rounds": {"clients": 2}, **sections}), spec)
    except ConfigInvalid as error:
        return [list(each) for each in error.fields]
    return []


def strategy(name):
    return {"strategy": name}


print(json.dumps({
    "weighted mean": faults(training=SCAFFOLD, aggregation=strategy("capped")),
    "another sum": faults(training=SCAFFOLD, aggregation=strategy("summed")),
    "proximal": faults(training=PROX, aggregation=strategy("capped")),
    "by steps": faults(training=PROX, aggregation=strategy("stepwise")),
    "strategy asked": faults(aggregation=strategy("picky")),
    "dense with scaffold": faults(training=SCAFFOLD, codec={"up": "float64"}),
    "sparse with scaffold": faults(training=SCAFFOLD, codec={"up": "gaps"}),
    "one version": faults(training=SCAFFOLD, rounds={"clients": 2, "policy": "everybody"}),
    "many versions": faults(training=SCAFFOLD, rounds={"clients": 2, "policy": "drifting"}),
    "policy asked": faults(rounds={"clients": 3, "policy": "drifting"}),
    "setting": faults(rounds={"clients": 2, "policy": "drifting", "concurrency": 4}),
    "no setting": faults(rounds={"clients": 2, "policy": "drifting", "max_staleness": 4}),
    "no setting either": faults(rounds={"clients": 2, "policy": "everybody", "concurrency": 4}),
    "all at once": faults(training=PROX, aggregation=strategy("stepwise"), rounds={"clients": 3, "policy": "drifting"}),
    "sparse down": faults(codec={"down": "gaps"}),
    "sparse family down": faults(codec={"down": "sparse"}),
    "unknown down": faults(codec={"down": "float128"}),
    "unknown values": faults(codec={"up": "sparse", "values": "float128"}),
    "values": parse_config({"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]},
        "peft": {"method": "bias"}, "codec": {"up": "sparse", "values": "float64"}}).codec.encoding,
}))
"""


def test_what_does_not_go_with_an_installed_part_is_refused_and_all_else_is_not(tmp_path: Path) -> None:
    install(tmp_path, "parts", PARTS, POINTS)
    found = run(tmp_path, COMBINED)
    scaffold = "training.algorithm is 'scaffold'"
    for name in ("weighted mean", "proximal", "dense with scaffold", "one version", "setting"):
        assert found.pop(name) == [], name
    assert found.pop("values") == "sparse+float64"
    mean = f"is 'summed'; one that takes the weighted mean is needed, as fedavg does; {scaffold}"
    assert found.pop("another sum") == [["aggregation.strategy", mean]]
    (field, text), *_ = found.pop("by steps")
    assert field == "aggregation.strategy" and text.endswith("training.algorithm is 'fedprox'")
    assert found.pop("strategy asked") == [["rounds.count", "is more than one; aggregation.strategy is 'picky'"]]
    ((field, text),) = found.pop("sparse with scaffold")
    assert field == "codec.up" and text.startswith("is 'gaps'; what it leaves out")
    ((field, text),) = found.pop("many versions")
    assert field == "rounds.policy" and text.endswith("algorithm 'scaffold' needs those of one")
    assert found.pop("policy asked") == [["rounds.clients", "must be two; rounds.policy is 'drifting'"]]
    assert [field for field, _ in found.pop("all at once")] == ["aggregation.strategy", "rounds.clients"]
    texts = {name: text for name, ((_, text),) in found.items()}
    assert texts == {
        "no setting": 'max_staleness is not a setting of rounds with policy = "drifting"',
        "no setting either": 'concurrency is not a setting of rounds with policy = "everybody"',
        "sparse down": "'gaps' is sparse, and a version has all of its values",
        "sparse family down": "'sparse' is sparse, and a version has all of its values",
        "unknown down": texts["unknown down"],
        "unknown values": texts["unknown values"],
    }
    assert texts["unknown down"].startswith("there is no encoding 'float128'; there are: bfloat16")
    known = "bfloat16, float16, float32, float64, int8"
    assert texts["unknown values"] == f"there is no encoding 'float128' of kept values; there are: {known}"


SIMULATED = """
import json, pathlib, sys
import numpy as np
from fedpeft.adapters.adapter_file import open_adapter
from fedpeft.config import parse_config
from fedpeft.models.tasks import task_of
from fedpeft.simulation import simulate

folder = pathlib.Path(sys.argv[1])
x = np.linspace(-1, 1, 16)
np.savetxt(folder / "line.txt", np.stack([x, 3 * x + 1], 1))
data = task_of("line").read(folder / "line.txt")


def outcome(name, codec, rounds={}, strategy="capped"):
    config = parse_config({"model": {"name": "line:any", "weights": "none"}, "peft": {"method": "full"},
        "rounds": {"count": 2, "clients": 2, **rounds}, "codec": codec, "aggregation": {"strategy": strategy}})
    report = simulate(config, {"a": data, "b": data, "c": data}, folder / name, device="cpu")
    with open_adapter(folder / name / "adapter.safetensors") as file:
        values = [float(value) for tensor in sorted(file) for value in file[tensor].ravel()]
    first = report["rounds"][0]
    return {"bytes": [first["payload_bytes_down"], first["payload_bytes_up"]], "values": values,
            "clients": len(first["clients"]), "clock": "clock" in report}


print(json.dumps({
    "float32": outcome("float32", {}), "float64": outcome("float64", {"up": "float64", "down": "float64"}),
    "half": outcome("half", {"up": "sparse", "values": "float64", "density": 0.5}),
    "gaps": outcome("gaps", {"up": "gaps", "density": 0.5}),
    "everybody": outcome("everybody", {}, {"policy": "everybody"}),
}))
"""


def test_an_installed_codec_serves_both_directions_and_an_installed_policy_is_not_taken_for_another(
    tmp_path: Path,
) -> None:
    install(tmp_path, "parts", PARTS, POINTS)
    install(tmp_path, "line", LINE, "[fedpeft.tasks]\nline = line:Line\n")
    found = run(tmp_path, SIMULATED)
    dense, wide, half, gaps = (found[name] for name in ("float32", "float64", "half", "gaps"))
    assert dense["bytes"] == [16, 16] and wide["bytes"] == [32, 32], "two clients, two values"
    assert wide["values"] == dense["values"]
    assert half == gaps and half["bytes"][0] == 16, "of the update, the larger of its two values"
    assert half["values"] != dense["values"]
    assert (found["everybody"]["clock"], found["everybody"]["clients"]) == (False, 2)
