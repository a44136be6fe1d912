"""Parts of a package that is installed beside fedpeft, a method or a strategy for instance: each found by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.registry import Registry

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
    def wanted(self, state, config):
        return 1000

    def lasts(self, state, ticket, config):
        return False


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
from fedpeft.rounds.state_machine import Round, Waiting, advance

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
    about = tmp_path / "outside-1.0.dist-info"
    about.mkdir()
    (tmp_path / "outside.py").write_text(PACKAGE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(POINTS)
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    refused = found.pop("refused")
    assert "aggregation strategy 'broken' (outside:Absent): AttributeError" in refused
    names = [True, True, True]
    assert found == {"strategy": "outside", "method": "outside", "encoding": "plain", "tickets": 5, "names": names}


def test_a_name_is_registered_once() -> None:
    registry: Registry[int] = Registry("fedpeft.ids", "fedpeft.nothing", "number")
    registry.register("one")(1)
    with pytest.raises(ValueError, match="number 'one' is registered twice"):
        registry.register("one")(1)
