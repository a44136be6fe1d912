"""The commands that need no server, the global flags, and how the command ends."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fedpeft import errors, formatting
from fedpeft.errors import SettingsInvalid
from fedpeft.process import output
from fedpeft_operator import app
from fedpeft_operator.cli import exit_codes
from fedpeft_operator.cli.session import address

# What ViT-S/16 tunes with 100 classes, as the paper counts.
VIT_S = {"full": 21_704_164, "head": 38_500, "bias": 89_956, "adapter": 75_796, "prompt": 84_580}


def fedpeft(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        app.main(list(arguments))
    return int(ended.value.code or 0)


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from fedpeft_operator.app import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit as ended:\n    assert ended.code == 0\n"
        "print('LOADED', [m for m in ('torch', 'timm', 'numpy', 'grpc', 'pydantic', 'pyarrow') if m in sys.modules])\n"
    )
    text = in_a_process(code)
    assert "LOADED []" in text
    assert "Exit codes" in text
    for command in ("run", "client", "params", "partition", "demo", "version"):
        assert command in text


def test_the_help_names_every_exit_code() -> None:
    codes = {str(int(code)) for code in exit_codes.Exit}
    assert set(re.findall(r"(\d+) [a-z]", exit_codes.in_help(exit_codes.Exit))) == codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigInvalid, 2),
        (errors.SettingsInvalid, 2),
        (errors.ServerUnreachable, 3),
        (errors.Draining, 3),
        (errors.RunNotFound, 4),
        (errors.VersionNotFound, 4),
        (errors.Internal, 1),
        (errors.PayloadInvalid, 1),
        (errors.ModelInvalid, 1),
    ],
)
def test_exit_code_of_an_error(error: type[errors.FedpeftError], code: int) -> None:
    assert exit_codes.code_of(error("what")) == code


@pytest.mark.parametrize(
    "text", ["", "localhost", ":7070", "localhost:", "localhost:0", "localhost:65536", "host:7o", "http://host:7070"]
)
def test_address_that_is_none(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsInvalid, match="HOST:PORT"):
        address(text)
    assert fedpeft("--server", text, "run", "list") == 2
    assert ("HOST:PORT" if text else "--server is empty") in capfd.readouterr().err


def test_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("run", "show") == 2
    assert fedpeft("run", "shew", "x") == 2
    assert fedpeft("params", "--model", "vit_tiny_patch16_224", "--classes", "1") == 2
    assert "Traceback" not in capfd.readouterr().err


def test_fault_of_ours_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(output, "say", broken)
    assert fedpeft("version") == 1
    ended = capfd.readouterr().err
    assert ended == (
        "fedpeft: unexpected ZeroDivisionError: division by zero; run it again with -v for the traceback\n"
    )


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fedpeft("params", "--model", "vit_tiny_patch16_224", "--classes", "2") == 1
    assert capfd.readouterr().err == (
        'fedpeft: this command needs torch, which is not installed; install it with: pip install "fedpeft[train]"\n'
    )


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("version", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["protocol"] == 1
    assert set(found) >= {"fedpeft", "python", "grpcio", "torch", "timm"}
    assert fedpeft("version") == 0
    assert capfd.readouterr().out.startswith(f"fedpeft {found['fedpeft']}\nprotocol 1\n")


def test_params(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ("params", "--model", "vit_small_patch16_224", "--classes", "100")
    assert fedpeft(*arguments, "--json") == 0
    rows = {row["method"]: row for row in json.loads(capfd.readouterr().out)}
    assert {name: rows[name]["parameters"] for name in VIT_S} == VIT_S
    factor = 4 * 12 * 8 * 3 * 384  # bytes of B, the larger factor, in all layers
    assert rows["rolora"]["payload_bytes"] == factor + 4 * 38_500, "a round of RoLoRA sends one factor"
    assert rows["fedsa_lora"]["payload_bytes"] == 4 * 12 * 8 * 384, "A alone is sent"
    whole = {name: row for name, row in rows.items() if name not in ("rolora", "fedsa_lora")}
    assert all(row["payload_bytes"] == 4 * row["parameters"] for row in whole.values())
    assert rows["adapter-per-block"]["parameters"] > rows["adapter"]["parameters"]
    assert rows["prompt-shallow"]["parameters"] == 38_500 + 10 * 384
    assert "lora" in rows


def test_params_prints_what_the_readme_shows(capfd: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    command, _, after = readme.partition("$ fedpeft params ")[2].partition("\n")
    assert fedpeft("params", *command.split()) == 0
    shown = capfd.readouterr()
    assert shown.out == after.partition("```")[0]
    assert shown.err == "building vit_base_patch16_224 without weights, and every method on it ...\n"


def test_params_leaves_out_and_names_what_does_not_fit_a_model(capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("params", "--model", "vit_base_patch16_rpn_224", "--classes", "2") == 0
    shown = capfd.readouterr()
    assert "\nbias " in shown.out and "adaptformer" not in shown.out
    assert "fedpeft: adaptformer is left out: adaptformer reads what enters the norm before" in shown.err


def test_params_of_no_model(capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("params", "--model", "vit_enormous", "--classes", "2") == 2
    assert "vit_enormous" in capfd.readouterr().err


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """60 rows of two classes from three makers."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "PNG")
    rows = [
        {"image": {"bytes": file.getvalue(), "path": None}, "label": k % 2, "maker": "abc"[k % 3]} for k in range(60)
    ]
    features = {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
    path = tmp_path / "images.parquet"
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("scheme", [("--partition", "natural"), ()])
def test_natural_partition(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], scheme: tuple[str, ...]
) -> None:
    out = tmp_path / "parts"
    arguments = ("partition", str(images), *scheme, "--column", "maker", "--out", str(out))
    assert fedpeft(*arguments) == 0
    assert capfd.readouterr().out == (
        f"60 rows for 3 clients (natural/maker) are in {out}\n"
        "  a: 20\n  b: 20\n  c: 20\n"
        "label skew: total variation 0.000, Jensen-Shannon 0.000 bits, 2.0 classes a client\n"
        "size skew: 20 to 20 rows, Gini 0.000, as good as 3.0 equal clients\n"
    )
    assert pq.read_table(out / "b" / "data.parquet")["maker"].to_pylist() == ["b"] * 20
    assert fedpeft(*arguments) == 1
    assert "holds a partition already" in capfd.readouterr().err


def test_a_data_set_is_opened_once_to_be_divided(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpeft.data import partition_writer
    from fedpeft.data.sources import opening

    opened: list[Path] = []
    real = opening.open_source

    def counted(path: Path, *arguments: Any) -> Any:
        opened.append(path)
        return real(path, *arguments)

    for module in (partition_writer, opening):
        monkeypatch.setattr(module, "open_source", counted)
    assert fedpeft("partition", str(images), "--clients", "2", "--out", str(tmp_path / "parts")) == 0
    assert opened == [images]


def test_clients_of_a_column_of_classes_have_their_names(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert fedpeft("partition", str(images), "--column", "label", "--out", str(tmp_path / "parts"), "--json") == 0
    record = json.loads(capfd.readouterr().out)
    assert [client["name"] for client in record["clients"]] == ["cat", "dog"]


def test_partition_of_other_columns(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(images)
    pq.write_table(table.rename_columns(["photo", "species", "maker"]), images)
    out = ("--clients", "2", "--out", str(tmp_path / "parts"))
    assert fedpeft("partition", str(images), *out) == 1
    assert "columns found: photo, species, maker; --image-column names another" in capfd.readouterr().err
    assert fedpeft("partition", str(images), "--image-column", "photo", *out) == 1
    assert "no label column 'label' or 'labels' or 'fine_label'" in capfd.readouterr().err
    columns = ("--image-column", "photo", "--label-column", "species")
    assert fedpeft("partition", str(images), *columns, "--index", *out) == 0
    assert fedpeft("doctor", "--data", str(tmp_path / "parts" / "client-0.index.json"), "--json") in (0, 1)
    assert fedpeft("doctor", "--data", str(images), *columns, "--json") in (0, 1)
    said = capfd.readouterr().out
    assert '"check": "data"' in said and "30 images of 2 classes" in said and "60 images of 2 classes" in said


def test_dirichlet_partition_as_index_files(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parts"
    scheme = ("--partition", "dirichlet", "--clients", "4", "--alpha", "0.5", "--seed", "3")
    assert fedpeft("partition", str(images), *scheme, "--out", str(out), "--index", "--json") == 0
    record = json.loads(capfd.readouterr().out)
    assert record == json.loads((out / "partition.json").read_text())
    assert (record["seed"], record["alpha"], len(record["clients"])) == (3, 0.5, 4)
    assert record["skew"]["total_variation"] > 0
    assert len(list(out.glob("*.index.json"))) == 4


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--partition", "iid"), "--partition iid needs --clients"),
        (("--partition", "natural"), "--partition natural needs --column"),
        (("--partition", "dirichlet", "--clients", "2"), "--partition dirichlet needs --alpha"),
        (("--partition", "iid", "--clients", "2", "--alpha", "1"), "--partition iid takes no --alpha; leave it out"),
    ],
)
def test_partition_flags_that_do_not_fit(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: tuple[str, ...], sentence: str
) -> None:
    assert fedpeft("partition", str(images), *flags, "--out", str(tmp_path / "parts")) == 2
    assert sentence in capfd.readouterr().err
    assert not (tmp_path / "parts").exists()


def test_partition_of_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fedpeft("partition", str(tmp_path / "absent"), "--clients", "2", "--out", str(tmp_path / "parts")) == 1
    assert "there is no data at" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (343_502_224, "327.59 MiB"), (5 * 2**30, "5.00 GiB")],
)
def test_sizes(count: int, text: str) -> None:
    assert formatting.size(count) == text


def test_paths_that_are_not_utf8_are_printed_escaped(images: Path, tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/m\xe4nner"
    os.mkdir(folder)
    os.rename(images, folder + b"/a.parquet")
    command = [
        sys.executable,
        "-m",
        "fedpeft_operator.app",
        "partition",
        folder,
        "--clients",
        "2",
        "--out",
        folder + b"/out",
    ]
    ended = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert rb"60 rows for 2 clients (iid) are in" in ended.stdout and rb"/m\udce4nner/out" in ended.stdout
    again = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert again.returncode == 1 and b"holds a partition already" in again.stderr
    assert b"Traceback" not in ended.stderr + again.stderr and b"unexpected" not in again.stderr
