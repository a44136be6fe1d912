"""The agent's side of the worker's protocol, with a process of the test's own at the other end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedpeft.process import logs
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
