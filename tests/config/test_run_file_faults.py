"""Any value in any field of a run file is taken, or answered with file, line and field; never with a traceback."""

from __future__ import annotations

import json
import re
import string
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fedpeft.config import RunConfig, faults_in, load_run_file, parse_config
from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.peft import make, methods, spec_of
from fedpeft.rpc.wire import config_from_proto, config_to_proto

GOOD: dict[str, Any] = {
    "name": "x",
    "model": {"name": "vit_tiny_patch16_224", "weights": "none", "classes": ["a", "b"], "depth": 1},
    "peft": {"method": "lora", "rank": 4},
    "rounds": {"count": 3},
    "simulation": {"clients": 2},
}


def sections(annotation: Any) -> list[type[BaseModel]]:
    found = [annotation, *get_args(annotation)]
    return [each for each in found if isinstance(each, type) and issubclass(each, BaseModel)]


FIELDS = [("", "name")] + [
    (section, field)
    for section, info in RunConfig.model_fields.items()
    for model in sections(info.annotation)
    for field in model.model_fields
]
OPTIONS = [("peft", option) for name in methods.names() for option in methods.get(name).Options.model_fields]

plain = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=80)
scalars = st.one_of(
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**18, max_value=10**400),
    st.floats(),
    plain,
    st.dates().map(lambda date: {"__date__": date.isoformat()}),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(plain, inner, max_size=3), max_leaves=6
)


def toml(value: Any) -> str:
    """A value as TOML writes it, in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        if list(value) == ["__date__"]:
            return str(value["__date__"])
        return "{" + ", ".join(f"{json.dumps(k, ensure_ascii=False)} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def written(document: dict[str, Any], section: str, field: str, value: Any) -> tuple[str, int]:
    """A run file with one field changed, and the line of that field."""
    lines: list[str] = []
    line = 0
    for name in dict.fromkeys(["", *[k for k, v in document.items() if isinstance(v, dict)], section]):
        table = {k: v for k, v in document.items() if not isinstance(v, dict)} if not name else document.get(name, {})
        lines += [f"[{name}]"] if name else []
        given = {**table, field: value} if name == section else table
        for key, each in given.items():
            lines.append(
                f"{key if re.fullmatch(r'[A-Za-z0-9_-]+', key) else json.dumps(key, ensure_ascii=False)} = {toml(each)}"
            )
            if (name, key) == (section, field):
                line = len(lines)
    return "\n".join(lines) + "\n", line


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "x.toml"


def checked(path: Path) -> None:
    """Does as `run create --check` without weights."""
    config = load_run_file(path)
    with faults_in(path):
        make(config.peft.method, config.peft.options)
    assert config_from_proto(config_to_proto(config)) == config.model_copy(update={"simulation": None})


@given(where=st.sampled_from(FIELDS + OPTIONS), value=values)
def test_any_value_in_any_field(file: Path, where: tuple[str, str], value: Any) -> None:
    section, field = where
    text, line = written(GOOD, section, field, value)
    file.write_text(text, encoding="utf-8")
    try:
        checked(file)
    except ConfigInvalid as error:
        places = [re.match(rf"{re.escape(str(file))}:(\d+): ([\w.]+)", each) for each in error.message.split("\n")]
        assert all(places), error.message
        found = [(int(place[1]), place[2]) for place in places if place]
        # A fault is of the field itself, or of its section where two fields contradict each other.
        path = f"{section}.{field}" if section else field
        assert all(named.partition(".")[0] == (section or field) for _, named in found)
        assert all(number == line for number, named in found if named == path)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", error.message)


@given(key=plain.filter(lambda key: key not in {f for s, f in FIELDS if s == "rounds"}), value=scalars)
def test_any_key_that_there_is_not(file: Path, key: str, value: Any) -> None:
    text, line = written(GOOD, "rounds", key, value)
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigInvalid) as caught:
        checked(file)
    where, _, what = caught.value.message.removeprefix(f"{file}:").partition(": ")
    assert what.startswith("rounds.") and "is not a known key" in what
    assert int(where) in (line, text.split("\n").index("[rounds]") + 1)


@given(st.text(string.printable, max_size=60))
def test_any_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigInvalid, match=re.escape(str(file))):
        checked(file)


@pytest.mark.parametrize("text", ["a = " + "[" * 9999, "a = " + "9" * 5000, "rounds.count = 0x" + "f" * 5000])
def test_monstrous_files_are_refused_in_a_short_sentence(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigInvalid) as caught:
        load_run_file(file)
    assert len(caught.value.message) < 600 + 4 * len(str(file))


@pytest.mark.parametrize(
    ("section", "field", "value", "says"),
    [
        ("rounds", "count", True, "rounds.count: Input should be a valid integer (got True)"),
        ("rounds", "count", 2.0, "rounds.count: Input should be a valid integer (got 2.0)"),
        ("rounds", "count", "2", "rounds.count: Input should be a valid integer (got '2')"),
        ("rounds", "deadline_s", True, "rounds.deadline_s: Input should be a valid number (got True)"),
        ("codec", "error_feedback", 1, "codec.error_feedback: Input should be a valid boolean (got 1)"),
        ("codec", "up", "gzip", "codec.up: there is no encoding 'gzip'; there are: bfloat16, "),
        ("peft", "rank", True, "peft.rank: Input should be a valid integer (got True)"),
        ("peft", "rnak", 8, "peft.rnak: is not an option of lora; there are: alpha, dropout, rank, targets"),
        ("peft", "targets", 3, "peft.targets: Input should be a valid string (got 3), or: should be a list (got 3)"),
        ("peft", "targets", ["x"], "peft.targets: 'x' fits no linear layer of a block; there are: attn.proj, "),
        ("peft", "targets", [], "peft.targets: names no layer; there are: attn.proj, "),
        ("training", "algorithm", "scaffold", "training.algorithm: should be a table (got 'scaffold')"),
        ("peft", "method", "bais", "peft.method: there is no PEFT method 'bais'; there are: adapter, "),
        ("aggregation", "mu", 1, "aggregation.mu: is not a known key"),
        ("model", "name", "vit_tiny_patch61_224", "model.name: timm "),
        ("model", "depth", 99, "model.depth: 99 is more than the 12 blocks of vit_tiny_patch16_224"),
        ("model", "image_size", 33, "model.image_size: 33 does not divide into patches of 16 pixels"),
    ],
)
def test_the_fault_stands_with_its_line(file: Path, section: str, field: str, value: Any, says: str) -> None:
    text, line = written(GOOD, section, field, value)
    file.write_text(text)
    with pytest.raises(ConfigInvalid) as caught, faults_in(file):
        config = load_run_file(file)
        spec_of(config.model, config.peft.method, config.peft.options)
    assert caught.value.message.startswith(f"{file}:{line}: {says}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('model = {name = "m", classes = ["a", "b"]}\npeft.method = "bias"\nrounds = {clients = 3, count = 0}', 3),
        ('model.name = "m"\nmodel.classes = ["a", "b"]\npeft.method = "bias"\n\nrounds.count = 0', 5),
        (
            'name = """\n[rounds]\ncount = 1\n"""\n["model"]\nname = "m"\nclasses = [\n "a", "count",\n "b"]\n'
            '[peft]\nmethod = "bias"\n[ rounds ] # count\n"count" = 0 # count',
            13,
        ),
    ],
)
def test_the_line_is_found_however_the_file_is_written(file: Path, text: str, line: int) -> None:
    tomllib.loads(text)
    file.write_text(text)
    with pytest.raises(ConfigInvalid) as caught:
        load_run_file(file)
    assert f"{file}:{line}: rounds.count: " in caught.value.message


def test_other_errors_pass_as_they_are(file: Path) -> None:
    with pytest.raises(ModelInvalid, match="no place"), faults_in(file):
        raise ModelInvalid("no place")


def test_what_is_true_of_a_file_is_true_of_a_message() -> None:
    with pytest.raises(ConfigInvalid, match=r"rounds\.count: Input should be a valid integer"):
        parse_config({**GOOD, "rounds": {"count": True}})


def test_a_field_that_was_overridden_is_no_fault_of_a_line(file: Path) -> None:
    file.write_text(
        '[model]\nname = "vit_tiny_patch16_224"\nclasses = ["a", "b"]\n'
        '[peft]\nmethod = "bias"\n[rounds]\ncount = 3\nclients = 0\n'
    )
    with pytest.raises(ConfigInvalid) as caught:
        load_run_file(file, {"rounds": {"count": 0, "cuont": 3}})
    lines = caught.value.message.splitlines()
    assert lines[0].startswith(f"set in place of {file}'s: rounds.count: Input should be greater")
    assert lines[1].startswith(f"{file}:8: rounds.clients: ")
    assert lines[2] == f"set in place of {file}'s: rounds.cuont: is not a known key (got 3)"
    with pytest.raises(ConfigInvalid, match=r"^set in place of"), faults_in(file, {"peft": {"method": "lora"}}):
        raise ConfigInvalid("peft.method: no place", (("peft.method", "no place"),))


@pytest.mark.parametrize(
    ("ranks", "fault"),
    [
        ([0], "simulation.ranks.0: Input should be greater than or equal to 1 (got 0)"),
        ([], "simulation.ranks: should have at least 1 item"),
    ],
)
def test_wrong_items_are_named_alone_and_a_list_without_any_is_said_to_lack_them(ranks: list[int], fault: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        parse_config({**GOOD, "simulation": {"ranks": ranks}})
    assert str(caught.value) == fault
