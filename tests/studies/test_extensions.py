"""Modules of one's own, by `--import`: what they register is known in every process, and decides a cell's name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft import extensions
from fedpeft.codecs import codecs
from fedpeft.errors import ConfigInvalid
from fedpeft.peft.method import methods
from fedpeft.studies.cells import Machine, cells_of
from fedpeft.studies.execution import execute
from fedpeft.studies.study_file import load_study

from ..conftest import preloaded_environment
from .study_texts import STUDY, pets, study_file

MACHINE = Machine(device="cpu", threads=1)
FAULTS = Path(__file__).parents[2] / "experiments" / "faults"
OWN = """
from fedpeft.peft.bias import Bias
from fedpeft.peft.method import methods


@methods.register("own_bias")
class OwnBias(Bias):
    pass
"""


@pytest.fixture(autouse=True)
def no_extension_stays(monkeypatch):
    methods.names()
    monkeypatch.setenv(extensions.VARIABLE, "")
    monkeypatch.setattr(methods, "_items", dict(methods._items))
    for name in ("own_part", "other_part", "faults"):
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]


def own_part(folder: Path, name: str = "own_part", text: str = OWN) -> Path:
    file = folder / f"{name}.py"
    file.write_text(text)
    return file


def test_a_file_brings_a_method_to_this_process_and_to_those_that_it_starts(tmp_path):
    extensions.extend([str(own_part(tmp_path))])
    assert methods.get("own_bias").__module__ == "own_part"
    said = subprocess.run(
        [sys.executable, "-c", "from fedpeft.peft.method import methods; print(methods.get('own_bias'))"],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "own_part.OwnBias" in said.stdout
    extensions.extend([str(tmp_path / "own_part.py")])
    assert len(extensions.extensions()) == 1, "named again it is not imported again"


def test_a_module_that_cannot_be_imported_is_refused_with_its_own_words(tmp_path):
    for module, words in (
        ("no_such_module", "--import no_such_module: ModuleNotFoundError: No module named 'no_such_module'"),
        (str(own_part(tmp_path, "other_part", "1 / 0")), "other_part.py: ZeroDivisionError: division by zero"),
        (str(own_part(tmp_path, "json")), "there is a module 'json' already"),
        (str(tmp_path / "gone.py"), "gone.py: FileNotFoundError"),
        (str(own_part(tmp_path, "own_part", OWN.replace("own_bias", "bias"))), "'bias' is registered twice"),
    ):
        with pytest.raises(ConfigInvalid, match=r"--import") as refused:
            extensions.extend([module])
        assert words in refused.value.message
        assert extensions.extensions() == [], "it is not left for other processes"


def test_a_later_study_of_a_program_hands_its_own_modules_to_its_cells(tmp_path):
    study, places = load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")}
    plain = cells_of(study, places)[:1]
    assert [done.failure for done in execute(study, plain, tmp_path / "out", MACHINE, 1)] == [""]
    extensions.extend([str(own_part(tmp_path))])
    own = cells_of(study, places, override={"peft": {"method": "own_bias"}}, only={"method": ["head"]})[:1]
    assert [done.failure for done in execute(study, own, tmp_path / "out", MACHINE, 1)] == [""]


BROKEN = (
    OWN
    + """

from fedpeft.codecs import codecs

codecs.register("own_codec")(codecs.get("float32"))  # of a class that is none of this module's
import own_dependency
"""
)


@pytest.mark.parametrize("by_file", [True, False])
def test_what_a_module_registered_before_it_failed_is_undone(tmp_path, monkeypatch, by_file):
    codecs.names()
    monkeypatch.setattr(codecs, "_items", dict(codecs._items))
    monkeypatch.setitem(sys.modules, "own_dependency", None)
    monkeypatch.syspath_prepend(tmp_path)
    file = own_part(tmp_path, text=BROKEN)
    module = str(file) if by_file else "own_part"
    for _ in range(2):
        with pytest.raises(ConfigInvalid, match=r"ModuleNotFoundError: import of own_dependency halted"):
            extensions.extend([module])
        assert "own_bias" not in methods.names() and "own_codec" not in codecs.names()
    monkeypatch.setitem(sys.modules, "own_dependency", codecs)
    extensions.extend([module])
    assert methods.get("own_bias").__module__ == "own_part" and "own_codec" in codecs.names()


def test_what_a_failed_module_imported_keeps_its_registrations(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    own_part(tmp_path)
    failing = own_part(tmp_path, "other_part", "import own_part\n1 / 0")
    for _ in range(2):
        with pytest.raises(ConfigInvalid, match="ZeroDivisionError"):
            extensions.extend([str(failing)])
        assert methods.get("own_bias").__module__ == "own_part"


def test_a_registry_without_a_named_module_does_not_answer_when_it_is_asked_again(monkeypatch):
    monkeypatch.setattr(methods, "_loaded", False)
    monkeypatch.setenv(extensions.VARIABLE, "no_such_module")
    for ask in (methods.names, methods.names, lambda: methods.get("bias")):
        with pytest.raises(ConfigInvalid, match="--import no_such_module"):
            ask()
    monkeypatch.setenv(extensions.VARIABLE, "")
    assert "bias" in methods.names()


def test_what_cannot_be_handed_on_or_has_no_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a:b").mkdir()
    with pytest.raises(ConfigInvalid, match="cannot be handed on"):
        extensions.extend([str(own_part(tmp_path / "a:b"))])
    (tmp_path / "only_a_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    extensions.extend(["only_a_folder"])
    with pytest.raises(ConfigInvalid, match=r"a folder without __init__\.py"):
        extensions.digests()


def test_a_cell_is_named_by_the_text_of_imported_modules(tmp_path):
    first = cells_of(load_study(study_file(tmp_path)), {"pets": pets(tmp_path / "pets")})[0]
    plain = first.key(Machine())
    file = own_part(tmp_path)
    extensions.extend([str(file)])
    with_own = first.key(Machine())
    file.write_text(OWN + "\n")
    assert len({plain, with_own, first.key(Machine())}) == 3


def test_the_command_imports_for_the_processes_of_its_cells(tmp_path):
    """Also the study of faults as it is written, on a few images: every one of its cells trains."""
    text = STUDY.replace('[axes.method."lora 2"]\npeft.method = "lora"\npeft.rank = 2', "")
    text = text.replace('[scales.one.axes.method."lora 2"]\ntraining.learning_rate = 0.5', "")
    for name, fields in {
        "dead": 'peft.method = "dead_adapter"',
        "statistics": 'peft.method = "bias_other_statistics"',
        "momentum": 'training = {momentum = 0.0, algorithm = {name = "leaking_momentum"}}',
        "weights": 'aggregation = {strategy = "fedavg_whole_batches", batch_size = 16}',
        "noise": 'training.algorithm = {name = "unaccounted_noise", sigma = 3.378}',
    }.items():
        text += f"\n[axes.method.{name}]\n{fields}\n"
    command = [
        *(sys.executable, "-m", "fedpeft_operator.app", "study", "run", str(study_file(tmp_path, text))),
        *(
            "--import",
            str(FAULTS / "faults.py"),
            "--data",
            str(pets(tmp_path / "pets")),
            "--out",
            str(tmp_path / "out"),
        ),
        *("--scale", "one", "--device", "cpu"),
    ]
    environment = {**os.environ, **preloaded_environment(), "FEDPEFT_IMPORT": ""}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "6 cells of 6 with results" in ended.stdout
    kept = json.loads(next((tmp_path / "out" / "cells").glob("*/cell.json")).read_text())
    assert list(kept["imports"]) == ["faults"]
