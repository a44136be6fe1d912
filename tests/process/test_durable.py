"""Files that are replaced whole, by several at once too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedpeft.errors import DiskFull, FedpeftError
from fedpeft.process import durable


def test_several_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, contents = tmp_path / "certificate.pem", [bytes([k]) * 100_000 for k in range(8)]

    def write(content: bytes) -> None:
        for _ in range(10):
            durable.write(path, content)

    with ThreadPoolExecutor(len(contents)) as pool:
        list(pool.map(write, contents))
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["certificate.pem"]


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    (path / "by a folder").mkdir(parents=True)
    with pytest.raises(OSError, match="irectory"):
        durable.write(path, b"data")
    assert os.listdir(tmp_path) == ["taken"]


def test_what_is_appended_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "progress.jsonl"
    code = (
        "import pathlib, resource, sys\n"
        "from fedpeft.process import durable\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 1000))\n"
        "durable.append(path, b'a' * 79 + b'\\n')\n"
        "try:\n"
        "    durable.append(path, b'b' * 49 + b'\\n')\n"
        "except OSError as error:\n"
        "    print(error.strerror, path.stat().st_size)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "durable.append(path, b'c' * 49 + b'\\n')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "File too large 80\n"
    assert path.read_bytes() == b"a" * 79 + b"\n" + b"c" * 49 + b"\n"


def test_a_file_is_its_owners_only(tmp_path: Path) -> None:
    durable.write(tmp_path / "key.pem", b"secret")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600


def test_a_file_for_people_may_be_read_by_others_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    held = os.umask(0o027)
    try:
        durable.write_text(tmp_path / "report.json", "{}")
        with durable.folder(tmp_path / "sites") as folder:
            (folder / "data").write_bytes(b"")
    finally:
        os.umask(held)
    assert (tmp_path / "report.json").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "sites").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, OSError])
def test_what_is_interrupted_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(b"old")
    with pytest.raises(error), durable.writing(path) as file:
        file.write(b"half")
        file.flush()
        raise error
    with pytest.raises(error), durable.folder(tmp_path / "sites") as folder:
        (folder / "half").write_bytes(b"half")
        raise error
    assert (os.listdir(tmp_path), path.read_bytes()) == (["data.parquet"], b"old")


def test_a_folder_takes_the_place_of_none_or_an_empty_one_and_no_other(tmp_path: Path) -> None:
    for name in ("new", "empty", "full"):
        if name != "new":
            (tmp_path / name).mkdir()
        if name == "full":
            (tmp_path / name / "mine").write_bytes(b"")
        try:
            with durable.folder(tmp_path / name) as folder:
                (folder / "data").write_bytes(b"")
        except OSError:
            assert name == "full"
    assert os.listdir(tmp_path / "new") == os.listdir(tmp_path / "empty") == ["data"]
    assert os.listdir(tmp_path / "full") == ["mine"]
    assert sorted(os.listdir(tmp_path)) == ["empty", "full", "new"]


KILLED = """
import os, signal, sys
from pathlib import Path
from fedpeft.process import durable
place = Path(sys.argv[1])
with durable.writing(place / "report.json") as file, durable.folder(place / "sites") as folder:
    file.write(b"half")
    (folder / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("by", ["the next writer", "the owner of the folder"])
def test_what_a_killed_process_left_is_swept_and_what_others_write_is_not(tmp_path: Path, by: str) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = os.listdir(tmp_path)
    assert len(left) == 2 and all(name.endswith(".new") for name in left)
    (tmp_path / "notes.new").write_text("somebody's own")
    with durable.writing(tmp_path / "other.json") as file, durable.scratch(tmp_path / "other") as folder:
        if by == "the next writer":
            durable.write_text(tmp_path / "report.json", "{}")
            with durable.scratch(tmp_path / "results"):  # of another name: folders may hold copies of images
                pass
            (tmp_path / "report.json").unlink()
        else:
            durable.sweep(tmp_path)
        assert folder.is_dir()
        assert len(os.listdir(tmp_path)) == 3  # what is being written, and somebody's own
        file.write(b"{}")
    assert sorted(os.listdir(tmp_path)) == ["notes.new", "other.json"]


def test_the_names_of_folders_that_are_made_or_there_are_forced_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced: list[Path] = []
    monkeypatch.setattr(durable, "sync", forced.append)
    durable.make_folder(tmp_path / "one" / "two", 0o700)
    assert forced == [tmp_path / "one", tmp_path]
    assert (tmp_path / "one" / "two").stat().st_mode & 0o777 == 0o700
    durable.make_folder(tmp_path / "one" / "two")  # who made it may have been killed before its name was forced
    assert forced[2:] == [tmp_path / "one"]


def test_a_link_stays_and_a_device_is_written_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "link.json").symlink_to("deep/report.json")
    durable.write_text(tmp_path / "link.json", "{}")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "deep" / "report.json").read_text() == "{}"
    durable.write_text(Path("/dev/null"), "{}")
    assert Path("/dev/null").is_char_device()


def test_a_name_of_the_longest_length_is_written(tmp_path: Path) -> None:
    durable.write_text(tmp_path / ("é" * 127), "{}")
    assert os.listdir(tmp_path) == ["é" * 127]


def test_what_a_file_system_refuses_is_said_with_what_to_do() -> None:
    cures = {errno.ENOSPC: "free some space", errno.EROFS: "mount it for writing", errno.EACCES: "the permissions"}
    for number, cure in cures.items():
        with (
            pytest.raises(FedpeftError, match=rf"^writing x failed: .*{cure}$") as caught,
            durable.refusals("writing x"),
        ):
            raise OSError(number, os.strerror(number))
        assert isinstance(caught.value, DiskFull) is (number == errno.ENOSPC)
