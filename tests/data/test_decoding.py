"""Decoding processes: started once for all rounds, bounded in number, and gone with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedpeft.data import decoding
from fedpeft.data.decoding import Decoders, decode_rows
from fedpeft.data.sources.interface import Indices
from fedpeft.data.sources.opening import open_source
from fedpeft.errors import DataInvalid

from ..training.test_loop import INPUT, write_images

HELD = """
import sys, time
from fedpeft.data import decoding
from fedpeft.data.sources.opening import open_source
from fedpeft.data.transforms import Preprocessing
import numpy as np
if __name__ == "__main__":
    source = open_source(sys.argv[1])
    decoders = decoding.Decoders(source, Preprocessing(8, (0.5,) * 3, (0.5,) * 3), 2)
    list(decoders.decoded([np.arange(2), np.arange(2, 4)]))
    (pool,) = decoding._pools.values()
    print(*pool._processes, flush=True)
    time.sleep(60)
"""


def processes(decoders: Decoders) -> set[int]:
    return set(decoding._pools[id(decoders)]._processes or ())


def test_the_same_processes_serve_every_round_in_order(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "x", 12, broken={5}))
    decoders = Decoders(source, INPUT, 2)
    batches: list[Indices] = [np.arange(at, at + 3) for at in range(0, 12, 3)]
    first = list(decoders.decoded(batches))
    started = processes(decoders)
    again = list(decoders.decoded(batches))
    assert processes(decoders) == started and len(started) <= 2
    for rows, (pixels, bad), (other, _) in zip(batches, first, again, strict=True):
        expected, expected_bad = decode_rows(source, INPUT, rows)
        assert np.array_equal(pixels, expected) and np.array_equal(other, expected) and bad == expected_bad
    decoders.end()
    assert id(decoders) not in decoding._pools


def test_the_pools_of_few_sources_are_kept(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "x", 4))
    several = [Decoders(source, INPUT, 1) for _ in range(decoding.POOLS + 1)]
    for decoders in several:
        assert len(list(decoders.decoded([np.arange(4)]))) == 1
    assert id(several[0]) not in decoding._pools and len(decoding._pools) == decoding.POOLS
    assert len(list(several[0].decoded([np.arange(4)]))) == 1, "they are started again"
    for decoders in several:
        decoders.end()


def test_a_process_that_ends_is_named_and_the_next_round_starts_another(tmp_path: Path) -> None:
    source = open_source(write_images(tmp_path / "x", 40))
    decoders = Decoders(source, INPUT, 1)
    list(decoders.decoded([np.arange(4)]))
    for number in processes(decoders):
        os.kill(number, signal.SIGKILL)
    with pytest.raises(DataInvalid, match="a process that decodes images ended"):
        for _ in range(100):
            list(decoders.decoded([np.arange(40)]))
    assert len(list(decoders.decoded([np.arange(4)]))) == 1
    decoders.end()


def test_no_process_outlives_one_that_was_killed(tmp_path: Path) -> None:
    write_images(tmp_path / "x", 4)
    (tmp_path / "held.py").write_text(HELD)
    command = [sys.executable, str(tmp_path / "held.py"), str(tmp_path / "x")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        numbers = [int(number) for number in holder.stdout.readline().split()]
        holder.kill()
    assert numbers
    until = time.monotonic() + 30
    while any(Path(f"/proc/{number}/cmdline").exists() for number in numbers):
        assert time.monotonic() < until, "a decoding process is left"
        time.sleep(0.05)
