"""A place that cannot be written is refused at the start of a command."""

import os
import shutil
import subprocess
import sys

import pytest

from fedpeft.errors import SettingsInvalid
from fedpeft_operator.app import main
from fedpeft_operator.cli.path_checks import check_results_folder

from .test_simulate import RUN_FILE


def test_results_may_go_into_a_folder_that_is_there_or_can_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path.relative_to(tmp_path), tmp_path / ".." / "x"):
        check_results_folder(out)
    assert list(tmp_path.iterdir()) == []


def test_results_cannot_go_into_a_file(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to("gone")
    for name, held in (("file", "file"), ("file/deep/er", "file"), ("nowhere/a", "nowhere")):
        with pytest.raises(SettingsInvalid, match=f"^--out .*{name}: .*/{held} is not a folder; name another place$"):
            check_results_folder(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
@pytest.mark.parametrize("name", ["ro", "ro/deep/er"])
def test_results_cannot_go_where_one_may_not_write(tmp_path, name):
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "ro").mkdir(mode=0o500)
    plain = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    begin = "from fedpeft_operator.app import main; main()"
    command = [*plain, sys.executable, "-c", begin, "simulate", "run.toml", "--data", ".", "--out", name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    said = f"fedpeft: --out {name}: you may not write in {tmp_path / 'ro'}; name another place\n"
    assert (done.returncode, done.stderr) == (2, said)


def test_simulate_refuses_its_folder_before_it_loads_anything(tmp_path, capfd, monkeypatch):
    (tmp_path / "run.toml").write_text(RUN_FILE)
    (tmp_path / "file").touch()
    for name in ("torch", "fedpeft.simulation", "fedpeft.config"):
        monkeypatch.setitem(sys.modules, name, None)  # an import fails
    with pytest.raises(SystemExit) as ended:
        main(["simulate", str(tmp_path / "run.toml"), "--data", str(tmp_path), "--out", str(tmp_path / "file")])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert said == f"fedpeft: --out {tmp_path / 'file'}: {tmp_path / 'file'} is not a folder; name another place\n"
