"""The agent's side of the worker's protocol, with a process of the test's own at the other end."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedpeft.process import logs
from fedpeft_client.timing import TIMING
from fedpeft_client.worker import handle
from fedpeft_client.worker.handle import WorkerProcess

DIES_AT_FIRST = """
import json, os, pathlib, sys
been_here = pathlib.Path(sys.argv[1])
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "stop":
        break
    if request["op"] == "train" and not been_here.exists():
        been_here.touch()
        os.write(1, b'{"result": {"metrics": {"accuracy": 0.')
        os.kill(os.getpid(), 9)
    print(json.dumps({"result": {"asked": request["op"]}}), flush=True)
"""


HANGS = """
import json, pathlib, sys, time
been_here = pathlib.Path(sys.argv[1])
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "stop":
        break
    if request["op"] == sys.argv[2] and not been_here.exists():
        been_here.touch()
        if "step" in sys.argv[3:]:
            print('{"progress": {"step": 1, "steps": 2}}', flush=True)
        for _ in range(600):
            time.sleep(1)
    for k in range(6):
        print(json.dumps({"progress": {"examples": k, "of": 6}}), flush=True)
        time.sleep(0.1)
    print(json.dumps({"result": {"asked": request["op"]}}), flush=True)
"""


@pytest.mark.parametrize("hangs_in", [("open",), ("check",), ("evaluate",), ("train",), ("train", "step")])
async def test_a_worker_without_a_word_is_killed_and_asked_again_whatever_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs_in: tuple[str, ...]
) -> None:
    """One that made a step is killed sooner; one that says that it goes on is not, however long it takes in all."""
    program, been_here = tmp_path / "worker.py", tmp_path / "been-here"
    program.write_text(HANGS)
    monkeypatch.setattr(handle, "_COMMAND", (sys.executable, str(program), str(been_here), *hangs_in))
    longest = {"away_s": 0.5, "load_s": 3600.0} if "step" in hangs_in else {"away_s": 3600.0, "load_s": 0.5}
    worker = WorkerProcess({"op": "open", "data": "none"}, logs.logger(), replace(TIMING, stall_s=0.25, **longest))
    try:
        with capture_logs() as lines:
            asked = "check" if hangs_in == ("open",) else hangs_in[0]
            assert await asyncio.wait_for(worker.ask({"op": asked}), 30) == {"asked": asked}
        assert been_here.exists()
        (died,) = (line for line in lines if line["event"] == "worker died")
        assert died["cause"] == "it was ended by SIGKILL after 0.5 seconds without a word"
    finally:
        await worker.close()


async def test_an_answer_that_the_workers_death_cut_off_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "worker.py"
    program.write_text(DIES_AT_FIRST)
    monkeypatch.setattr(handle, "_COMMAND", (sys.executable, str(program), str(tmp_path / "been-here")))
    worker = WorkerProcess({"op": "open", "data": "none"}, logs.logger())
    try:
        assert await worker.ask({"op": "train"}) == {"asked": "train"}
        assert (tmp_path / "been-here").exists()
    finally:
        await worker.close()
