"""Run files that are wrong are refused with the line, and in words that lead back to the file."""

import time
from pathlib import Path

import pytest

from fedpeft.config import load_run_file, parse_config
from fedpeft.errors import ConfigInvalid

GOOD = """\
name = "x"
[model]
name = "vit_tiny_patch16_224"
classes = ["a", "b"]
[peft]
method = "bias"
"""


def _file(folder: Path, text: str) -> Path:
    file = folder / "x.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('name = "x"', 'name = "\\u001b[31mred"', ":1: name: holds the control character '\\x1b'"),
        ('name = "x"', 'name = "two\\nlines"', ":1: name: holds the control character '\\n'"),
        ('"b"', '"b\\u0000"', ":4: model.classes.1: holds the control character '\\x00'"),
        ('"b"', "2", ":4: model.classes.1: Input should be a valid string (got 2)"),
        ('["a", "b"]', '"ab"', ":4: model.classes: should be a list (got 'ab')"),
        ('"bias"', '"bias"\n[codec]\nup = "gzip"', ":8: codec.up: there is no encoding 'gzip'; there are: bfloat16, "),
    ],
)
def test_a_fault_is_named_with_its_line(tmp_path: Path, old: str, new: str, fault: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_run_file(_file(tmp_path, GOOD.replace(old, new)))
    assert fault in str(caught.value).replace(str(tmp_path / "x.toml"), "")


def test_the_encodings_named_are_those_of_the_run_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        load_run_file(_file(tmp_path, GOOD + '[codec]\nup = "gzip"\n'))
    assert "there are: bfloat16, " in str(caught.value)


def test_unicode_names_and_a_byte_order_mark_are_welcome(tmp_path: Path) -> None:
    config = load_run_file(_file(tmp_path, "\ufeff" + GOOD.replace('"x"', '"😀 ünïcode"')))
    assert config.name == "😀 ünïcode"


def test_very_many_classes_with_one_twice_are_refused_at_once() -> None:
    classes = [str(n) for n in range(99_999)] + ["7"]
    begun = time.perf_counter()
    with pytest.raises(ConfigInvalid, match="class '7' is named twice"):
        parse_config({"model": {"name": "m", "classes": classes}, "peft": {"method": "bias"}})
    assert time.perf_counter() - begun < 10  # comparing each with each takes minutes
