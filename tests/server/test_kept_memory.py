"""Memory for the next chunk is kept by the process, and not asked of the system for every one."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

TIMES = 100
SCRIPT = f"""
import resource
from fedpeft_server.__main__ import keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def pass_chunks():
    for n in range({TIMES}):
        held = [b"x" * (1 << 20) for _ in range(6)]
        del held

{{keep}}
pass_chunks()
before = faults()
pass_chunks()
print((faults() - before) / {TIMES} / 6)
"""


def faults_of_a_chunk(keep: str, **environment: str) -> float:
    """Returns the page faults for a chunk, of which six are held at a time, after others like it."""
    script = SCRIPT.format(keep=keep)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", script], env=inherited | environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has mallopt")
def test_buffers_of_chunks_are_used_again() -> None:
    assert faults_of_a_chunk("keep_memory()") < 32 < 128 < faults_of_a_chunk("")


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has mallopt")
def test_the_environment_decides_otherwise() -> None:
    small = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    assert faults_of_a_chunk("keep_memory()", **small) > 128
