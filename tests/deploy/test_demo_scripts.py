"""The scripts of the demo's composition: interrupted at any point they go on when they are said again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from ..data.test_sources import table, write
from .conftest import ROOT

SITES = {
    "site-1": "emojione",
    "site-2": "fluent-emoji-flat",
    "site-3": "noto",
    "site-4": "twemoji",
    "site-gpu": "fxemoji",
}
VOLUMES = ("server", "operator", "postgres", "grafana", "s3", "backbone", "site-evaluator", *SITES)


def said(script: str, place: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    """Runs a script of the demo whose files lie at a place, without root's right to pass over modes."""
    text = (ROOT / "deploy" / "demo" / script).read_text().replace("/opt/demo", str(place))
    text = text.replace("/tmp/sites", str(place / "sites"))
    (place / script).write_text(text)
    plain = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    programs = f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [*plain, "sh", str(place / script)], capture_output=True, text=True, env={**os.environ, "PATH": programs}
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for volume in VOLUMES:
        (tmp_path / "volumes" / volume).mkdir(parents=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "model.safetensors").write_bytes(b"weights" * 100)
    vendors = [list(SITES.values())[number % len(SITES)] for number in range(30)]
    images = table(30).drop_columns("vendor").append_column("vendor", pa.array(vendors))
    write(tmp_path / "data" / "train.parquet", images)
    write(tmp_path / "data" / "test.parquet", table(6))
    return tmp_path


def test_what_an_interruption_left_half_made_is_made_anew_and_the_rest_is_kept(place: Path) -> None:
    volumes = place / "volumes"
    assert (first := said("init.sh", place)).returncode == 0, first.stderr
    kept = (volumes / "grafana" / "password").read_text()
    images = sorted(path.name for path in (volumes / "site-1" / "data").iterdir())
    (volumes / "server" / "pgpass").unlink()  # the password was written, what the server is given was not
    (volumes / "server" / "s3.env").unlink()
    (volumes / "postgres" / "password.part").write_text("half")
    (volumes / "postgres" / "password.part").chmod(0o444)
    (volumes / "site-1" / "data").rename(volumes / "site-1" / "data.part")
    (volumes / "backbone" / "model.safetensors").write_bytes(b"weights")
    assert (again := said("init.sh", place)).returncode == 0, again.stderr
    password = (volumes / "postgres" / "password").read_text()
    assert len(password) == 32
    assert (volumes / "server" / "pgpass").read_text() == f"postgres:5432:fedpeft:fedpeft:{password}\n"
    assert (volumes / "server" / "s3.env").read_text() == (
        f"AWS_ACCESS_KEY_ID=fedpeft\nAWS_SECRET_ACCESS_KEY={(volumes / 's3' / 'password').read_text()}\n"
    )
    modes = [(volumes / name).stat().st_mode & 0o777 for name in ("postgres/password", "server/pgpass", "postgres")]
    assert modes == [0o444, 0o600, 0o755]
    assert (volumes / "grafana" / "password").read_text() == kept
    assert sorted(path.name for path in (volumes / "site-1" / "data").iterdir()) == images
    assert (volumes / "backbone" / "model.safetensors").read_bytes() == b"weights" * 100
    assert not list(volumes.rglob("*.part"))


@pytest.mark.parametrize(
    ("listed", "ends", "calls"),
    [
        ("exit 3", 3, []),
        ("echo '[]'", 0, ["run create", "run watch"]),
        ("""echo '[{"run": "run-a"}, {"run": "run-b"}]'""", 0, ["run watch run-b"]),
    ],
)
def test_a_list_that_fails_is_no_list_without_runs(place: Path, listed: str, ends: int, calls: list[str]) -> None:
    (place / "bin").mkdir()
    command = place / "bin" / "fedpeft"
    command.write_text(f'#!/bin/sh\n[ "$2" = list ] || {{ echo "$@" >> {place}/calls; exit 0; }}\n{listed}\n')
    command.chmod(0o755)
    assert said("run.sh", place, str(place / "bin")).returncode == ends
    made = (place / "calls").read_text().splitlines() if (place / "calls").exists() else []
    assert len(made) == len(calls) and all(map(str.startswith, made, calls))
