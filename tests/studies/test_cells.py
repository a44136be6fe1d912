"""Study files and their cells: what is laid over what, what is refused before anything runs, what names a cell."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from fedpeft.config import parse_config
from fedpeft.config.overrides import merged
from fedpeft.data.partition_writer import write_parts
from fedpeft.data.partitions import iid
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import ConfigInvalid, DataInvalid
from fedpeft.simulation.content import FORMAT, content_of, name_of
from fedpeft.studies.assembly import Changes, assembled
from fedpeft.studies.cells import Machine, axis_of, cells_of, content_digest, grid_axes
from fedpeft.studies.checks import check_cells
from fedpeft.studies.study_file import load_study

from ..data.hub_cache import HubCache
from ..data.test_sources import png, table, write
from ..programs import run_program
from .study_texts import STUDY, pets, study_file

DEFAULTS = Path(__file__).with_name("defaults.json")
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def cells(folder: Path, text: str = STUDY, scale: str | None = None, **options):
    return cells_of(load_study(study_file(folder, text), scale), {"pets": pets(folder / "pets")}, **options)


def test_every_combination_of_points_and_seeds_is_a_cell(tmp_path):
    found = cells(tmp_path)
    assert [cell.label for cell in found] == [
        "method=head, seed=0",
        "method=head, seed=1",
        "method=lora 2, seed=0",
        "method=lora 2, seed=1",
    ]
    assert [cell.config.peft.method for cell in found] == ["head", "head", "lora", "lora"]
    assert found[2].config.peft.options == {"rank": 2}
    assert [cell.config.rounds.seed for cell in found] == [0, 1, 0, 1]
    assert all(cell.config.model.classes == ("cat", "dog", "emu") for cell in found), "fields of the data set"
    assert found[0].train == tmp_path / "pets" / "train.parquet"
    assert found[0].test == tmp_path / "pets" / "test.parquet"


def test_a_scale_lies_over_all_of_the_file(tmp_path):
    found = cells(tmp_path, scale="one")
    assert [cell.seed for cell in found] == [7, 7]
    assert all(cell.config.rounds.count == 1 and cell.config.rounds.clients == 2 for cell in found)
    assert found[1].config.training.learning_rate == 0.5
    assert found[1].config.peft.options == {"rank": 2}


def test_a_scale_takes_points_away_and_adds_others(tmp_path):
    text = f'{STUDY}\n[scales.less.axes.method]\n"lora 2" = false\nbias = {{peft.method = "bias"}}\n'
    assert [cell.points["method"] for cell in cells(tmp_path, text, "less")] == ["head", "head", "bias", "bias"]
    with pytest.raises(ConfigInvalid, match=r"axes.method.head"):
        cells(tmp_path, f"{STUDY}\n[scales.less.axes.method]\nhead = 3\n", "less")


def test_a_base_lies_under_the_file_and_its_paths_are_its_own(tmp_path):
    (tmp_path / "below").mkdir()
    base = STUDY.replace("[data.pets.run.model]", '[data.pets]\ntrain = "pets/train.parquet"\n[data.pets.run.model]')
    study_file(tmp_path / "below", base)
    pets(tmp_path / "below" / "pets")
    over = study_file(tmp_path, 'base = "below/study.toml"\nname = "over"\nseeds = [3]\n[run.rounds]\ncount = 5\n')
    found = cells_of(load_study(over), {})
    assert [(cell.seed, cell.config.rounds.count) for cell in found] == [(3, 5), (3, 5)]
    assert found[0].train == tmp_path / "below" / "pets" / "train.parquet"
    (tmp_path / "circle.toml").write_text('base = "circle.toml"\n')
    with pytest.raises(ConfigInvalid, match="leads back to this file"):
        load_study(tmp_path / "circle.toml")


def test_paths_of_a_scale_are_beside_the_file_that_has_it(tmp_path):
    (tmp_path / "below").mkdir()
    place = '[scales.{name}.data.pets]\ntrain = "pets/train.parquet"\n'
    study_file(tmp_path / "below", STUDY + place.format(name="one"))
    over = study_file(tmp_path, f'base = "below/study.toml"\nname = "over"\n{place.format(name="two")}')
    for scale, folder in (("one", tmp_path / "below"), ("two", tmp_path)):
        pets(folder / "pets")
        assert cells_of(load_study(over, scale), {})[0].train == folder / "pets" / "train.parquet"


def test_a_value_in_place_of_a_table_of_the_base_is_a_fault_of_the_file(tmp_path):
    study_file(tmp_path)
    (tmp_path / "over.toml").write_text('base = "study.toml"\ndata.pets = "path"\n')
    with pytest.raises(ConfigInvalid, match=r"over.toml:2: data.pets: should be a table \(got 'path'\)"):
        load_study(tmp_path / "over.toml")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[scales.one]\nseeds = [7, 7]", "over.toml:4: scales.one.seeds: a seed stands twice"),
        ("[scales.one]\nsedes = [7]", "over.toml:4: scales.one.sedes: is not a known key"),
        ('[scales.one.data.pets]\ntrain = ""', "over.toml:4: scales.one.data.pets.train: is empty"),
        ("target = 2.0", "over.toml:3: target: .*less than or equal to 1"),
        ("[scales.one.data.cats.run]\nx = 1\n[scales.one.data.cats.ru]", "over.toml:5: scales.one.data.cats.ru: is"),
        ("", "study.toml:31: scales.one.seeds.0: .*greater than or equal to 0"),
    ],
)
def test_a_fault_is_named_with_the_scale_and_the_file_that_have_it(tmp_path, text, fault):
    study_file(tmp_path, STUDY if text else STUDY.replace("seeds = [7]", "seeds = [-7]"))
    (tmp_path / "over.toml").write_text(f'base = "study.toml"\nname = "over"\n{text}\n')
    with pytest.raises(ConfigInvalid, match=fault):
        load_study(tmp_path / "over.toml", "one")


def test_no_line_of_the_file_is_to_blame_for_what_a_flag_sets(tmp_path):
    with pytest.raises(ConfigInvalid, match=r"^set in place of .*study.toml's: seeds: a seed stands twice$"):
        assembled(study_file(tmp_path), {"pets": pets(tmp_path / "pets")}, Changes(seeds=[1, 1]), Machine("cpu"))


def test_flags_choose_points_set_fields_and_add_axes(tmp_path):
    only = cells(tmp_path, only={"method": ["lora 2"]}, override={"rounds": {"count": 9}})
    assert {cell.points["method"] for cell in only} == {"lora 2"}
    assert {cell.config.rounds.count for cell in only} == {9}
    assert grid_axes(["training.learning_rate=0.01,0.03", "peft.method=bias,head"]) == {
        "training.learning_rate": {
            "0.01": {"training": {"learning_rate": 0.01}},
            "0.03": {"training": {"learning_rate": 0.03}},
        },
        "peft.method": {"bias": {"peft": {"method": "bias"}}, "head": {"peft": {"method": "head"}}},
    }
    for wanted in ("head", []):
        with pytest.raises(ConfigInvalid, match="give a list of its points: head, lora 2"):
            cells(tmp_path, only={"method": wanted})
    for wrong in ("x", "a=", "a=1,1", "=1"):
        with pytest.raises(ConfigInvalid):
            grid_axes([wrong])
    with pytest.raises(ConfigInvalid, match="there is no axis 'depth'; the axes of this study: method"):
        cells(tmp_path, only={"depth": ["1"]})
    with pytest.raises(ConfigInvalid, match="axis 'method' has no point 'bias'; there are: head, lora 2"):
        cells(tmp_path, only={"method": ["bias"]})


@pytest.mark.parametrize("axes", [("peft.rank", "peft.method"), ("peft.method", "peft.rank")])
def test_an_axis_of_options_crosses_one_of_the_names_that_they_are_of(tmp_path, axes):
    values = {"peft.rank": [4, 16], "peft.method": ["lora", "dora"]}
    study = load_study(study_file(tmp_path, STUDY.replace('method = "head"', 'method = "lora"')))
    study = study.model_copy(update={"axes": {axis: axis_of(axis, values[axis]) for axis in axes}})
    found = cells_of(study, {"pets": pets(tmp_path / "pets")})
    made = {(cell.config.peft.method, cell.config.peft.options["rank"]) for cell in found}
    assert made == {("lora", 4), ("lora", 16), ("dora", 4), ("dora", 16)}


def test_a_name_that_is_set_goes_with_options_of_an_axis(tmp_path):
    study = load_study(study_file(tmp_path))
    study = study.model_copy(update={"axes": {"peft.rank": axis_of("peft.rank", [4, 8])}})
    found = cells_of(study, {"pets": pets(tmp_path / "pets")}, override={"peft": {"method": "lora"}})
    assert {(cell.config.peft.method, cell.config.peft.options["rank"]) for cell in found} == {("lora", 4), ("lora", 8)}


def test_points_that_come_out_equal_are_refused(tmp_path):
    fault = "^method=head, seed=0 and method=lora 2, seed=0 are the same run on the same data: what is set for all"
    with pytest.raises(ConfigInvalid, match=fault):
        cells(tmp_path, override={"peft": {"method": "bias"}})
    with pytest.raises(ConfigInvalid, match=r"^method=head, seed=0 and method=other, seed=0 are .*: give one of them$"):
        cells(tmp_path, STUDY + "[axes.method.other]\n")
    only = cells(tmp_path, override={"peft": {"method": "bias"}}, only={"method": ["head"]})
    assert [cell.config.peft.method for cell in only] == ["bias", "bias"]


def test_a_run_file_is_a_study_of_one_cell(tmp_path):
    run = '[model]\nname = "vit_tiny_patch16_224"\nclasses = ["cat", "dog", "emu"]\n[peft]\nmethod = "head"\n'
    found = cells_of(load_study(study_file(tmp_path, run)), {"data": pets(tmp_path / "pets")})
    assert [(cell.label, cell.config.peft.method) for cell in found] == [("seed=0", "head")]
    (found,) = cells_of(load_study(study_file(tmp_path, f"{run}[rounds]\nseed = 7\n")), {"data": tmp_path / "pets"})
    assert found.seed == 7, "its own seed"


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("seeds = [0, 1]", "seeds = [0, 0]", "study.toml:5: seeds: a seed stands twice"),
        ("seeds = [0, 1]", "seed = [0]", r"study.toml:5: seed: is not a known key"),
        (
            'peft.method = "lora"',
            'data = "cats"',
            r"study.toml:27: axes.method.\"lora 2\".data: is 'cats'; the data sets of this study: pets",
        ),
        ("target = 0.01", 'data_set = "cats"', "study.toml:6: data_set: is 'cats'; the data sets of this study: pets"),
        ("[axes.method.head]", "[axes.seed.head]", "study.toml:25: axes.seed: no axis has this name; give seeds"),
        ("[axes.method.head]", "[axes.loss.head]", "study.toml:25: axes.loss: no axis has this name, .* of results"),
        ("count = 2", "count = 0", "rounds.count"),
        ("target = 0.01", "target = 1.5", "target"),
        ("clients = 2", "clients = 2\nseed = 9", "method=head: rounds.seed: a study has its seeds apart"),
        ('peft.method = "lora"', "rounds.seed = 9", "method=lora 2: rounds.seed: a study has its seeds apart"),
        ('peft.method = "lora"', "rounds = 9", "method=lora 2: rounds: should be a table"),
        ('peft.method = "lora"', 'data = ["pets"]', r"axes.method.\"lora 2\".data: is \['pets'\]; the data sets"),
        ("[data.pets.run", '[data.pets]\ntrain = ""\n[data.pets.run', "study.toml:23: data.pets.train: is empty"),
        ("[axes.method.head]", "[axes.empty]", "study.toml:25: axes.empty: has no point"),
        ("[axes.method.head]", '[axes.method."\\u009b31m"]', r"study.toml:25: axes.method"),
    ],
)
def test_a_fault_is_named_with_the_cell_or_the_line(tmp_path, old, new, fault):
    with pytest.raises(ConfigInvalid, match=fault):
        cells(tmp_path, STUDY.replace(old, new, 1))


@pytest.mark.parametrize(
    "table", ["scales", "scales.x", "scales.x.axes", "scales.x.axes.method", "axes.method", "data"]
)
@pytest.mark.parametrize("below", [False, True])
def test_what_is_laid_over_something_is_a_table(tmp_path, table, below):
    (tmp_path / "base.toml").write_text(f"{table} = 3\n")
    text = 'base = "base.toml"\n[axes.method.head]\n' if below else f"{table} = 3\n"
    with pytest.raises(ConfigInvalid, match=rf"{'base' if below else 'study'}.toml: {table}: should be a table"):
        load_study(study_file(tmp_path, text), "x")


def test_a_scale_takes_no_point_away_that_is_not_there(tmp_path):
    text = f"{STUDY}\n[scales.less.axes.method]\nhaed = false\n"
    with pytest.raises(ConfigInvalid, match="takes point 'haed' away, which is not there; there are: head, lora 2"):
        cells(tmp_path, text, "less")


def test_a_scale_adds_points_to_an_axis_and_no_axis(tmp_path):
    text = f"{STUDY}\n[scales.more.axes.method.bias]\npeft.method = 'bias'\n"
    assert {cell.points["method"] for cell in cells(tmp_path, text, "more")} == {"head", "lora 2", "bias"}
    with pytest.raises(ConfigInvalid, match="there is no axis 'methd'; there are: method"):
        cells(tmp_path, text.replace("axes.method.bias", "axes.methd.bias"), "more")


def test_a_cell_of_another_task_is_named_by_whether_its_data_are_divided(tmp_path):
    model = {"name": "text:tiny", "classes": ["a", "b"], "weights": "none"}
    run = {"model": model, "peft": {"method": "full"}}
    names = set()
    for simulation in ({"engine": "inprocess"}, {"clients": 8}, {"partition": "iid"}):
        config = parse_config({**run, "simulation": simulation})
        content = content_of(config, train="0", test=None, weights=None, threads=1, device="cpu")
        names.add(name_of(content))
    assert len(names) == 2


@pytest.mark.parametrize("others", [("meta",), ()])
def test_folders_of_splits_are_known_beside_others(tmp_path, others):
    for name in ("train", "test", *others):
        (tmp_path / "data" / name / "a").mkdir(parents=True)
        (tmp_path / "data" / name / "a" / "0.png").write_bytes(png(1))
    (cell, *_) = cells_of(load_study(study_file(tmp_path)), {"pets": tmp_path / "data"})
    assert (cell.train.name, cell.test.name) == ("train", "test")


def test_a_class_may_be_called_train(tmp_path):
    study = load_study(study_file(tmp_path))
    for names, train in ((("bus", "train"), "."), (("train", "test"), "train"), (("train",), "train")):
        folder = tmp_path / "-".join(names)
        for name in names:
            (folder / name / "a").mkdir(parents=True)
            (folder / name / "a" / "0.png").write_bytes(png(1))
        (cell, *_) = cells_of(study, {"pets": folder})
        assert cell.train == folder / train
        assert (cell.test is None) == ("test" not in names)


def test_missing_data_is_named_with_the_flag_that_would_name_it(tmp_path):
    study = load_study(study_file(tmp_path))
    with pytest.raises(DataInvalid, match="the study file says no place for it; give --data pets=FOLDER"):
        cells_of(study, {})
    with pytest.raises(DataInvalid, match=r"absent is not there; give --data pets=FOLDER"):
        cells_of(study, {"pets": tmp_path / "absent"})
    with pytest.raises(ConfigInvalid, match="there is no data set 'cats'; those of this study: pets"):
        cells_of(study, {"cats": tmp_path})


def test_data_given_without_a_held_out_part_keep_that_of_the_file(tmp_path):
    held_out = '[data.pets]\ntest = "pets/test.parquet"\n[data.pets.run.model]'
    study = load_study(study_file(tmp_path, STUDY.replace("[data.pets.run.model]", held_out)))
    folder, train = pets(tmp_path / "pets"), tmp_path / "train.parquet"
    train.write_bytes((folder / "train.parquet").read_bytes())
    found = cells_of(study, {"pets": train})[0]
    assert (found.train, found.test) == (train, folder / "test.parquet")
    (folder / "test.parquet").unlink()
    with pytest.raises(DataInvalid, match=r"data set 'pets': there is no data at .*test\.parquet"):
        cells_of(study, {"pets": train})


def test_held_out_data_alone_are_not_trained_on(tmp_path):
    folder = pets(tmp_path / "pets")
    (folder / "train.parquet").unlink()
    with pytest.raises(DataInvalid, match=r"data set 'pets': .*pets holds test.parquet and no train.parquet"):
        cells_of(load_study(study_file(tmp_path)), {"pets": folder})


def test_data_may_lie_on_the_hub(tmp_path, monkeypatch):
    hub, machine = HubCache(tmp_path / "hub", monkeypatch), Machine(device="cpu")
    for split, rows in (("train", 30), ("test", 9)):
        hub.put("uoft-cs/cifar10", f"plain_text/{split}-00000-of-00001.parquet", table(rows, image="img"))
    study = load_study(study_file(tmp_path))
    both, trained = (cells_of(study, {"pets": Path(place)})[0] for place in ("hub:cifar10", "hub:cifar10/train"))
    names = '[data.pets]\ntrain = "hub:cifar10/train"\ntest = "hub:cifar10/test"\n[data.pets.run.model]'
    written = cells_of(load_study(study_file(tmp_path, STUDY.replace("[data.pets.run.model]", names))), {})[0]
    check_cells([both, trained, written], machine)
    assert both.key(machine) == written.key(machine) != trained.key(machine)
    assert both.train == trained.train and trained.test is None
    with pytest.raises(DataInvalid, match="has no split 'valid' in parquet; in the cache of it are: test, train"):
        cells_of(study, {"pets": Path("hub:cifar10/valid")})


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("clients = 3", "clients = 31", "method=head, seed=0: .*31"),
        ("rank = 2", "rank = 0", r"method=lora 2, seed=0: peft.rank: .*greater than or equal to 1"),
        ('method = "lora"', 'method = "lorra"', r"method=lora 2, seed=0: .*lorra"),
        ("clients = 2", "clients = 4\nquorum = 4", r"method=head, seed=0: a round needs 4 clients .*, and there are 3"),
        (
            "rank = 2",
            'rank = 2\naggregation.strategy = "fednova"\ntraining.algorithm.name = "fedprox"',
            "lora 2.*fednova",
        ),
        ("[run.simulation]", '[run.simulation]\nengine = "cloud"', "cloud"),
        ("[scales.one]", '[axes.engine.one]\n[axes.engine.other]\nsimulation.engine = "cloud"\n[scales.one]', "cloud"),
        (
            "[scales.one]",
            "[axes.rank.one]\n[axes.rank.other]\nsimulation.ranks = [2]\n[scales.one]",
            "simulation.ranks",
        ),
        (
            "[run.simulation]",
            "[run.training]\nmomentum = 0.0\n"
            '[run.training.algorithm]\nname = "scaffold"\npopulation = 16\n[run.simulation]',
            "training.algorithm.population is 16, and there are 3 clients in all",
        ),
    ],
)
def test_cells_that_cannot_work_are_refused_before_one_runs(tmp_path, old, new, fault):
    with pytest.raises((ConfigInvalid, DataInvalid), match=fault):
        check_cells(cells(tmp_path, STUDY.replace(old, new, 1)), Machine("cpu"))


def test_a_cell_is_named_by_its_content_alone(tmp_path, monkeypatch):
    first, second, third, _ = cells(tmp_path)
    machine = Machine(device="cpu", threads=1)
    keys = {cell.key(machine) for cell in (first, second, third)}
    assert len(keys) == 3
    renamed = cells(tmp_path, STUDY.replace('"lora 2"', '"small lora"').replace('name = "tiny"', 'name = "other"'))
    assert renamed[2].key(machine) == third.key(machine), "names are for people"
    monkeypatch.setattr("fedpeft.studies.cells.device_of", lambda wanted: torch.device("cpu"))
    assert first.key(Machine(device="auto")) == first.key(machine), "by whatever name it was asked for"
    monkeypatch.setattr("fedpeft.studies.cells.device_of", lambda wanted: torch.device("cuda:0"))
    assert first.key(Machine(device="auto")) == first.key(Machine(device="cuda:0")) != first.key(machine)
    assert first.key(Machine(device="cpu", threads=2)) != first.key(machine), "threads decide the last bits"
    content_digest.cache_clear()
    with (tmp_path / "pets" / "test.parquet").open("ab") as file:
        file.write(b"0")
    assert first.key(machine) not in keys, "other data"
    content_digest.cache_clear()


def test_a_cell_is_named_by_the_bytes_of_the_weights_file_that_its_run_names(tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"one")
    machine = Machine(device="cpu", threads=1)
    cell = cells(tmp_path, override={"model": {"weights": str(weights)}})[0]
    before = cell.key(machine)
    weights.write_bytes(b"two")
    content_digest.cache_clear()
    assert cell.key(machine) != before


def test_a_cell_is_named_by_the_images_that_index_files_are_of(tmp_path):
    data, parts = pets(tmp_path / "pets") / "train.parquet", tmp_path / "parts"
    source = open_source(data)
    write_parts(data, iid(len(source), 3, 0), parts, index=True)
    (cell, *_) = cells_of(load_study(study_file(tmp_path)), {"pets": parts})
    before = cell.key(Machine("cpu"))
    content_digest.cache_clear()
    assert cell.key(Machine("cpu")) == before
    rows = pq.read_table(data)
    images = [{**image, "bytes": image["bytes"][::-1]} for image in rows["image"].to_pylist()]
    write(data, rows.set_column(0, "image", [images]))
    content_digest.cache_clear()
    assert cell.key(Machine("cpu")) != before


NAMES = """
import json, sys
from pathlib import Path
from fedpeft.config import parse_config
from fedpeft.extensions import extend
from fedpeft.simulation.content import content_of, name_of
extend(sys.argv[1].split())
for file in map(Path, sys.argv[2:]):
    said = json.loads(file.read_text())
    config = parse_config({"name": "any", **said["run"]})
    print(name_of(content_of(config, **{key: said[key] for key in ("train", "test", "weights", "threads", "device")})))
"""


def test_results_that_are_kept_are_found_again_by_their_names(tmp_path):
    """In processes of their own: what a study imports stays registered."""
    by_imports: dict[str, list[Path]] = {}
    for file in sorted(RESULTS.glob("*/cells/*/cell.json")):
        imports = json.loads(file.read_text()).get("imports", {})
        modules = " ".join(str(RESULTS.parent / "faults" / f"{name}.py") for name in imports)
        by_imports.setdefault(modules, []).append(file)
    assert sum(map(len, by_imports.values())) > 40
    for modules, kept in by_imports.items():
        done = run_program(tmp_path, NAMES, modules, *map(str, kept))
        assert done.stdout.split() == [file.parent.name for file in kept], done.stderr


def test_the_defaults_that_names_of_cells_leave_out_are_those_of_their_format():
    """A default that changed makes another result under the same name: then raise FORMAT and write the file anew."""
    model = {"name": "m", "classes": ["a", "b"]}
    now = parse_config({"name": "n", "model": model, "peft": {"method": "bias"}}).model_dump(mode="json")
    kept = json.loads(DEFAULTS.read_text())
    assert kept["format"] == FORMAT
    assert merged(now, kept["run"]) == now, "a field may be new; none may have gone or changed"


def test_a_grid_has_no_comma_without_a_value():
    with pytest.raises(ConfigInvalid, match=r"'rate=0\.01,,0\.03' has a comma without a value"):
        grid_axes(["rate=0.01,,0.03"])
