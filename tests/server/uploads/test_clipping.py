"""A run with a bound: larger updates are refused, and what was folded is an event of the round."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np

from fedpeft.adapters import payload
from fedpeft.privacy.events import Clipped
from fedpeft.rounds.record import ledger, parse
from fedpeft.rpc import wire
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft.v1 import run_pb2

from ..conftest import SPEC, Daemon, config, fault, filled, header

VALUES = sum(tensor.size for tensor in SPEC.tensors)


async def test_an_update_above_the_bound_is_refused_and_the_round_goes_on(daemon: Daemon) -> None:
    bound = 0.5 * math.sqrt(VALUES)
    rounds = {"count": 1, "clients": 2, "quorum": 1, "deadline_s": 3}
    run = await daemon.create(config(rounds=rounds, privacy={"clip_norm": bound}))
    assert wire.config_from_proto(run.config).privacy is not None
    large, good = await daemon.clients("large", "good")
    tasks = await asyncio.gather(*(client.task(run.id) for client in (large, good)))
    error = await fault(large.push(tasks[0].ticket, filled(0.51)))
    assert error.reason == "PAYLOAD_INVALID" and "the client did not clip it" in error.message
    assert error.fields[0][0] == "header.manifest.tensors"
    state = await large.upload(tasks[0].ticket)
    assert state.state == run_pb2.TICKET_STATE_REFUSED and state.committed_bytes == 0
    assert tasks[0].ticket not in daemon.server.store.spool.tickets(), "its bytes are removed"
    manifest, data = payload.encode(filled(0.5), SPEC.sent(1), "float32")
    await good.push_raw(header(tasks[1].ticket, manifest, clip_factor=0.25), [(0, data)])
    await daemon.until(run.id, lambda run: run.version == 1)
    assert set((await daemon.adapter(run.id, 1))["head.weight"].flat) == {np.float32(0.5)}
    (done,) = await daemon.rounds(run.id)
    assert done.metrics["clipped_updates"] == 1
    full = await daemon.operator.ListRounds(op.ListRoundsRequest(run=run.id))
    record = parse(full.rounds[0].record)
    assert ledger([record]) == [(1, Clipped(bound, 1))]
    show = [str(Path(sys.executable).with_name("fedpeft")), "--server", daemon.server.settings.listen, "run", "show"]
    shown = await asyncio.to_thread(subprocess.run, [*show, run.id, "--json"], capture_output=True, text=True)
    (row,) = json.loads(shown.stdout)["rounds"]
    assert row["events"] == [{"kind": "clipped", "bound": bound, "count": 1}]
    assert {t["client"]: t["metrics"] for t in row["tickets"]}["good"]["clip_factor"] == 0.25
