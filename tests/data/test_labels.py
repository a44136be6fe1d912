import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.labels import map_labels, read_label_map
from fedpeft.errors import DataInvalid

RUN = ("cat", "dog", "emu")


@given(st.permutations(RUN), st.permutations(RUN), st.lists(st.sampled_from(RUN), min_size=1, max_size=20))
def test_two_sites_with_different_class_orders_agree(first, second, truth):
    labels = [
        map_labels(order, np.array([order.index(name) for name in truth]), RUN).labels for order in (first, second)
    ]
    assert labels[0].tolist() == labels[1].tolist() == [RUN.index(name) for name in truth]


def test_a_map_renames_merges_and_drops():
    own = ("Katze", "kitten", "Hund", "noise")
    mapped = map_labels(
        own, np.array([3, 0, 1, 2, 3]), RUN, {"Katze": "cat", "kitten": "cat", "Hund": "dog", "noise": None}
    )
    assert mapped.rows.tolist() == [1, 2, 3]
    assert mapped.labels.tolist() == [0, 0, 1]
    assert (mapped.examples, mapped.dropped) == (3, 2)


def test_an_unknown_class_is_named_with_those_of_the_run():
    with pytest.raises(
        DataInvalid, match=r"class 'fox' \(2 rows\) is not among the run's; the run's classes are cat, dog, emu"
    ):
        map_labels(("cat", "fox"), np.array([0, 1, 1]), RUN)


def test_an_unknown_class_without_rows_does_no_harm():
    assert map_labels(("fox", "cat"), np.array([1]), RUN).labels.tolist() == [0]


def test_a_map_to_a_class_that_the_run_has_not():
    with pytest.raises(DataInvalid, match="sends 'Katze' to 'cta'"):
        map_labels(("Katze",), np.array([0]), RUN, {"Katze": "cta"})


def test_a_map_that_drops_everything():
    with pytest.raises(DataInvalid, match="drops all 2 rows"):
        map_labels(("cat",), np.array([0, 0]), RUN, {"cat": None})


def test_many_classes_are_cut_in_the_message():
    with pytest.raises(DataInvalid, match="19 and 80 more"):
        map_labels(("fox",), np.array([0]), tuple(map(str, range(100))))


def test_files(tmp_path):
    (tmp_path / "m.toml").write_text('Katze = "cat"\n"0" = "dog"\nnoise = ""\n')
    (tmp_path / "m.json").write_text(json.dumps({"Katze": "cat", "0": "dog", "noise": None}))
    want = {"Katze": "cat", "0": "dog", "noise": None}
    assert read_label_map(tmp_path / "m.toml") == read_label_map(tmp_path / "m.json") == want


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.toml", "a = ", "is not TOML"),
        ("m.json", "{", "is not JSON"),
        ("m.json", "[1]", "is not a table"),
        ("m.json", '{"a": 3}', "'a' is 3; a class of the run"),
        ("m.toml", "[a]\nb = 'c'", "'a' is {'b': 'c'}"),
        ("m.csv", "cat,dog", "m.csv is not JSON: .*; a label map is NAME.toml or NAME.json"),
        ("m.yaml", "cat: dog", "a label map is NAME.toml or NAME.json"),
    ],
)
def test_faulty_files(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataInvalid, match=message):
        read_label_map(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"cat": "cat", "cat": "dog"}', "names 'cat' twice; one line for each class"),
        ('{"caf\\u00e9": "cat", "cafe\\u0301": "dog"}', "twice, in two forms of Unicode"),
        ('{"a": {"b": 1, "b": 2}}', "names 'b' twice"),
    ],
)
def test_a_map_that_names_a_class_twice_is_refused(tmp_path, text, message):
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(DataInvalid, match=message):
        read_label_map(tmp_path / "m.json")


def test_names_are_compared_in_nfc_on_every_side():
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    rows = np.array([0, 1])
    assert map_labels((nfd, "dog"), rows, (nfc, "dog")).labels.tolist() == [0, 1]
    assert map_labels((nfc, "dog"), rows, (nfd, "dog")).labels.tolist() == [0, 1]
    assert map_labels((nfd, nfc), rows, ("dog", nfc)).labels.tolist() == [1, 1]
    assert map_labels((nfd, "Hund"), rows, ("dog", nfc), {nfc: nfd, "Hund": "dog"}).labels.tolist() == [1, 0]
    assert map_labels((nfd, "Hund"), rows, ("dog", nfc), {nfc: None, "Hund": "dog"}).rows.tolist() == [1]


@pytest.mark.parametrize(
    ("own", "hint"),
    [
        ("Cat", "differs from 'cat' in case or white space only"),
        ("dog ", "differs from 'dog' in case or white space only"),
        (r"m\xe4nnlich", "its folder's name is not UTF-8; in Latin-1 it is 'm\u00e4nnlich'"),
    ],
)
def test_a_class_that_is_nearly_one_of_the_run_is_pointed_out(own, hint):
    with pytest.raises(DataInvalid, match=hint):
        map_labels((own,), np.array([0]), ("cat", "dog", "m\u00e4nnlich"))
    with pytest.raises(DataInvalid, match=hint):
        map_labels(("x",), np.array([0]), ("cat", "dog", "m\u00e4nnlich"), {"x": own})


def test_a_missing_file(tmp_path):
    with pytest.raises(DataInvalid, match="cannot read label map"):
        read_label_map(tmp_path / "none.toml")
