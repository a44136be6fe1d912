"""The mounted file system that a path is on."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fedpeft.process.mounts import Mount, mount_of


def mounted(proc: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the system say that these are mounted."""
    (proc / "self").mkdir()
    (proc / "self" / "mounts").write_text(lines)
    (proc / "filesystems").write_text("\text4\n")
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))


def test_it_is_that_with_the_longest_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = f"/dev/a / ext4 rw 0 0\nnas:/x {tmp_path}/a\\040share nfs rw 0 0\n/dev/b {tmp_path}/a xfs rw 0 0\n"
    mounted(tmp_path, lines, monkeypatch)
    assert mount_of(tmp_path / "a share" / "x.png") == Mount("nas:/x", f"{tmp_path}/a share", "nfs")
    assert mount_of(tmp_path / "ab" / "x.png") == Mount("/dev/a", "/", "ext4")


def test_of_two_at_one_place_it_is_the_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted(
        tmp_path, f"/dev/a / ext4 rw 0 0\n/dev/b {tmp_path} xfs rw 0 0\n/dev/c {tmp_path} nfs4 rw 0 0\n", monkeypatch
    )
    found = mount_of(tmp_path)
    assert found is not None and found.type == "nfs4"


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "nothing"))
    assert mount_of(tmp_path) is None


def test_this_machine_says_something() -> None:
    found = mount_of("/")
    assert found is not None and found.place == "/"
