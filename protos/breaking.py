"""Fails when the protos break callers of what is on main already (`buf breaking`, offline).

Compared with: the place where this branch left main (origin/main where there is one); on main itself, the commit
before. The newest release tag, once there is one, is held to as well.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUF = Path(sys.executable).parent / "buf"


def git(*arguments: str) -> str | None:
    """Returns what git prints, or None if it fails."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def bases() -> list[str]:
    """Returns the commits that the protos must not break, without repetitions."""
    head = git("rev-parse", "HEAD")
    main = next((m for m in ("origin/main", "main") if git("rev-parse", "--verify", m)), "HEAD")
    left = git("merge-base", "HEAD", main)
    base = git("rev-parse", "--verify", "HEAD^") if left == head else left
    tag = git("describe", "--tags", "--abbrev=0", "--match", "v*")
    commits = [c for c in (base, tag and git("rev-parse", f"{tag}^{{commit}}")) if c]
    return list(dict.fromkeys(commits))


def unpack(commit: str, folder: Path) -> bool:
    """Writes the protos of a commit under `folder`; False if it had none."""
    if not git("ls-tree", commit, "protos/buf.yaml"):
        return False
    archive = subprocess.run(["git", "archive", commit, "protos"], cwd=ROOT, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder)
    return True


def main() -> int:
    """Compares with every base."""
    compared, status = 0, 0
    for commit in bases():
        with tempfile.TemporaryDirectory() as folder:
            if unpack(commit, Path(folder)):
                against = Path(folder) / "protos"
                print(f"protos: compared with {commit[:12]}", flush=True)
                done = subprocess.run([BUF, "breaking", "protos", "--against", against], cwd=ROOT)
                compared, status = compared + 1, status or done.returncode
    if not compared:
        print("protos: nothing to compare with, no earlier commit here has protos")
    return status


if __name__ == "__main__":
    sys.exit(main())
