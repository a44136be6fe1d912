"""An S3 of the tests' own: moto's server, which keeps its buckets in memory."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ACCESS = {
    "AWS_ACCESS_KEY_ID": "tests",
    "AWS_SECRET_ACCESS_KEY": "tests",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}
"""Variables by which any S3 is found, but its endpoint."""
_PLACES = os.pathsep.join([str(Path(__file__).parents[2] / ".venv-s3" / "bin"), os.environ.get("PATH", "")])


def program() -> str | None:
    """Returns the program of an S3, if one is installed."""
    return shutil.which("moto_server", path=_PLACES)


@contextmanager
def s3_server() -> Iterator[str]:
    """Starts an S3; gives its endpoint. The test is skipped where there is no program for it."""
    found = program()
    if found is None:
        pytest.skip("moto_server, an S3 for tests, is not installed: make s3")
    # Where Python's own warnings go is not looked at, and the line that says the port is on standard error.
    server = subprocess.Popen(
        [found, "-H", "127.0.0.1", "-p", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stderr is not None
        lines = (line for line in server.stderr if "Running on " in line)
        endpoint = next(lines).partition("Running on ")[2].strip()
        server.stderr.close()
        yield endpoint
    finally:
        server.kill()
        server.wait()
