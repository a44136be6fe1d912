"""Parts of a package that is installed beside fedpeft, a method or a strategy for instance: each found by its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.registry import Registry

from .installed import LINE, install, run

PACKAGE = """
from collections.abc import Mapping
from fedpeft.aggregation import Doubles, Strategy, UpdateFacts
from fedpeft.codecs import codecs
from fedpeft.peft import Method
from fedpeft.rounds.policies import RoundPolicy


class Halves(Strategy):
    def step(self, x, delta, state):
        return x + delta / 2, {}


class Norms(Method):
    def tunes(self, name):
        return "norm" in name


PLAIN = codecs.get("float32")


class Everybody(RoundPolicy):
    def wanted(self, state, config, now):
        return 1000

    def late_for(self, state, ticket, config):
        return ""


EVERYBODY = Everybody()
"""
POINTS = """
[fedpeft.methods]
norms = outside:Norms
[fedpeft.strategies]
halves = outside:Halves
broken = outside:Absent
[fedpeft.codecs]
plain = outside:PLAIN
[fedpeft.policies]
everybody = outside:EVERYBODY
"""
CODE = """
import json
from fedpeft.aggregation import strategies, strategy
from fedpeft.codecs import codecs
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.peft import methods
from fedpeft.rounds.events import Waiting
from fedpeft.rounds.state_machine import Round, advance

RUN = {"model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b"]}, "peft": {"method": "norms"},
       "aggregation": {"strategy": "halves"}, "codec": {"up": "plain"}, "rounds": {"clients": 2, "policy": "everybody"}}
config = parse_config(RUN)
try:
    parse_config({**RUN, "aggregation": {"strategy": "broken"}})
    refused = ""
except ConfigInvalid as error:
    refused = str(error)
print(json.dumps({
    "strategy": type(strategy("halves", {})).__module__,
    "method": methods.get("norms").__module__,
    "encoding": config.codec.encoding,
    "tickets": len(advance(Round("run", 1), Waiting(frozenset("abcde")), config.rounds, 0.0)[0].tickets),
    "names": ["halves" in strategies.names(), "norms" in methods.names(), "plain" in codecs.names()],
    "refused": refused,
}))
"""


def test_a_package_beside_fedpeft_brings_a_method_a_strategy_a_codec_and_a_round_policy(tmp_path: Path) -> None:
    install(tmp_path, "outside", PACKAGE, POINTS)
    found = run(tmp_path, CODE)
    refused = found.pop("refused")
    assert "aggregation strategy 'broken' (outside:Absent): AttributeError" in refused
    names = [True, True, True]
    assert found == {"strategy": "outside", "method": "outside", "encoding": "plain", "tickets": 5, "names": names}


ALGORITHM = """
from fedpeft.algorithms import AlgorithmOptions, LocalAlgorithm, RoundEnd


class GentleOptions(AlgorithmOptions):
    factor: float = 0.5


class Gentle(LocalAlgorithm):
    Options = GentleOptions
    groups = ("seen",)

    def start(self, start):
        self.parameters, self.seen = start.parameters, start.state["seen"]

    def after_gradient(self):
        for parameter in self.parameters.values():
            parameter.grad.mul_(self.options.factor)

    def finish(self, steps):
        return RoundEnd({"seen": {name: seen + steps for name, seen in self.seen.items()}})
"""
AT_WORK = """
import json, pathlib, sys
import numpy as np
from fedpeft.config import parse_config
from fedpeft.errors import ConfigInvalid
from fedpeft.models.tasks import task_of
from fedpeft.simulation import simulate
from fedpeft.simulation.client_memory import ClientMemory

folder = pathlib.Path(sys.argv[1])
x = np.linspace(-1, 1, 16)
np.savetxt(folder / "line.txt", np.stack([x, 3 * x + 1], 1))
kept = []
keep = ClientMemory.keep
ClientMemory.keep = lambda self, client, state, *rest: (kept.append(state), keep(self, client, state, *rest))[1]


def losses(algorithm):
    config = parse_config({"model": {"name": "line:any", "weights": "none"}, "peft": {"method": "full"},
                           "rounds": {"count": 2, "clients": 1}, "training": {"momentum": 0.0, "algorithm": algorithm}})
    report = simulate(config, {"a": task_of("line").read(folder / "line.txt")}, folder / "out", device="cpu")
    return [each["metrics"]["train_loss"] for each in report["rounds"]]


plain, gentle = losses({"name": "plain"}), losses({"name": "gentle", "factor": 0.25})
seen = [float(state["gentle-seen"]["0.bias"][0]) for state in kept if "gentle-seen" in state]
try:
    losses({"name": "gentle", "fact": 1.0})
    refused = ""
except ConfigInvalid as error:
    refused = str(error)
print(json.dumps({"plain": plain, "gentle": gentle, "seen": seen, "refused": refused}))
"""


def test_packages_beside_fedpeft_bring_a_task_and_a_local_algorithm_that_work_together(tmp_path: Path) -> None:
    install(tmp_path, "line", LINE, "[fedpeft.tasks]\nline = line:Line\n")
    install(tmp_path, "gentle", ALGORITHM, "[fedpeft.algorithms]\ngentle = gentle:Gentle\n")
    found = run(tmp_path, AT_WORK)
    assert found["plain"][1] < found["gentle"][1] < found["gentle"][0] == found["plain"][0]
    assert found["seen"] == [1.0, 2.0], "its state comes back in the next round"
    assert "training.algorithm.fact: is not a known key" in found["refused"]


CLASH = """
import json
from fedpeft.aggregation import strategies
from fedpeft.errors import ConfigInvalid
from fedpeft.models.tasks import tasks


def asked(registry, name):
    try:
        return registry.get(name).__module__
    except ConfigInvalid as error:
        return str(error)


print(json.dumps({
    "built in": asked(strategies, "fedavg"), "again": asked(strategies, "fedavg"), "twice": asked(strategies, "halves"),
    "other": asked(strategies, "median"), "thirds": asked(strategies, "thirds"), "both groups": asked(tasks, "line"),
}))
"""
REGISTERS = """
from fedpeft.aggregation import strategies
from fedpeft.aggregation.fedavg import FedAvg


@strategies.register("thirds")
class Thirds(FedAvg):
    pass


class Halves(FedAvg):
    pass
"""


def test_a_name_that_is_built_in_and_installed_or_installed_twice_is_refused(tmp_path: Path) -> None:
    install(tmp_path, "outside", PACKAGE, "[fedpeft.strategies]\nhalves = outside:Halves\nfedavg = outside:Halves\n")
    points = "[fedpeft.strategies]\nhalves = twin:Halves\nthirds = twin:Thirds\n"
    install(tmp_path, "twin", REGISTERS, points)
    install(tmp_path, "line", LINE, "[fedpeft.kinds]\nline = line:Old\n[fedpeft.tasks]\nline = line:Line\n")
    found = run(tmp_path, CLASH)
    fedavg = "strategy 'fedavg' is both fedpeft.aggregation.fedavg:FedAvg and outside:Halves of the installed package"
    assert fedavg in found["built in"] and found["again"] == found["built in"]
    assert all(each in found["twice"] for each in ("'halves' is both", "outside:Halves", "twin:Halves"))
    assert found["other"] == "fedpeft.aggregation.median", "of another name nothing is in doubt"
    assert found["thirds"] == "twin", "its module may register it as well"
    assert found["both groups"] == "line", "the new group counts where one package names both"


def test_a_name_is_registered_once() -> None:
    registry: Registry[int] = Registry("fedpeft.ids", "fedpeft.nothing", "number")
    registry.register("one")(1)
    with pytest.raises(ValueError, match="number 'one' is registered twice"):
        registry.register("one")(1)
