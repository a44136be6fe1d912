"""The processes of a world: the daemon and the agents as their commands run them, and an operator.

Agents have a worker that trains nothing in the place of torch: `simulated_time.worker`. All else is theirs: sockets,
state directories, logs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from simulated_time.worker import ROWS, SimulatedWorker

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.api.operator_client import OperatorClient
from fedpeft.config import RunConfig, parse_config
from fedpeft.errors import FedpeftError
from fedpeft.identity.folder import Identity
from fedpeft.process import durable
from fedpeft.v1 import run_pb2
from fedpeft_client import __main__ as client_command
from fedpeft_client import app as client_app
from fedpeft_operator.cli.run.verify import verified
from fedpeft_server import __main__ as server_command

CLIENTS = ("a", "b", "c", "d")
EVALUATOR = "e"
DAEMONS = ("server", "server-2", "server-3")
CERTIFICATES_S = 48
"""Life of a client's certificate."""
SPEC = AdapterSpec.of("bias", [TensorSpec("blocks.0.bias", (7,)), TensorSpec("head.weight", (400, 500))])
"""An update has four chunks, and a residual besides."""


def run_config(rounds: int, wanted: int, *, buffered: bool) -> RunConfig:
    """Returns the run of a world: what client and server keep from round to round is in its bits.

    Args:
        rounds: Rounds.
        wanted: Updates that a round closes with; all clients train for each.
        buffered: True for versions that are made of updates of any age.
    """
    held: dict[str, Any] = {"count": rounds, "clients": wanted, "quorum": wanted, "min_available": wanted, "seed": 5}
    if buffered:
        held |= {"policy": "buffered", "concurrency": len(CLIENTS), "max_staleness": 2, "quorum": 1}
    else:
        held["over_selection"] = len(CLIENTS) / wanted - 1
    return parse_config(
        {
            "name": "chaos",
            "model": {"name": "vit_tiny_patch16_224", "classes": ["a", "b", "c"]},
            "peft": {"method": "bias"},
            "rounds": {**held, "deadline_s": 6, "max_extensions": 5},
            "codec": {"up": "int8", "down": "int8"},
            "aggregation": {"strategy": "fedbuff" if buffered else "fedavgm"},
        }
    )


def serve(data: Path, port: int, places: Sequence[str], variables: Mapping[str, str]) -> int:
    """Runs a daemon.

    Args:
        data: Its data folder.
        port: Its port.
        places: Flags that name what is not in that folder.
        variables: Variables of its environment.
    """
    os.environ.update(variables)
    where = ["--data-dir", str(data), "--listen", f"127.0.0.1:{port}", "--metrics", "", "--keep-updates"]
    life = ["--certificate-life-s", str(CERTIFICATES_S)]
    sys.argv = ["fedpeft-server", *where, *life, *places, "--drain-s", "1", "--log-format", "json"]
    server_command.main()
    return 0


def take_part(name: str, state: Path, port: int, longest_s: float) -> int:
    """Runs a client, or the evaluator; no training takes longer than `longest_s`."""
    client_app.WorkerProcess = partial(Worker, longest_s)  # type: ignore[misc, assignment]
    where = ["--server", f"127.0.0.1:{port}", "--name", name, "--data", str(state), "--state-dir", str(state)]
    flags = ["--evaluate"] if name == EVALUATOR else []
    return client_command.run([*where, *flags, "--log-format", "json"])


class Worker(SimulatedWorker):
    """Stands for `WorkerProcess`; scores versions as well."""

    def __init__(self, longest_s: float, options: dict[str, Any], log: Any, timing: Any) -> None:
        ROWS.setdefault(EVALUATOR, 50)
        super().__init__(options["client"], random.Random(), timing, longest_s)

    async def start(self) -> dict[str, Any]:
        """Loads, in no time."""
        self.hello = {
            "torch": "2.13.0",
            "device": "cpu",
            "gpu": "",
            "threads": 1,
            "methods": ["bias"],
            "rows": ROWS[self._client],
            "rows_are": "images",
            "labels": ["a", "b", "c"],
            "inventory": {},
        }
        return self.hello

    async def ask(self, request: dict[str, Any], on_progress: Any = lambda _: None) -> dict[str, Any]:
        """Scores, or does as `SimulatedWorker`."""
        if request["op"] != "evaluate":
            return await super().ask(request, on_progress)
        digest = durable.sha256(Path(request["adapter"]["payload"]))
        return {"metrics": {"accuracy": digest[0] / 255, "loss": float(digest[1])}}


def operate(port: int, config: RunConfig, said: Path, identity: Path | None) -> int:
    """Creates the run, and resumes it when it pauses; says in a file what becomes of it.

    A file beside that, `stop`, has it end the run.
    """
    asyncio.run(_Operator(port, said, identity).operate(config))
    return 0


def verify(port: int, run: str, spool: Path, identity: Path | None) -> int:
    """Verifies a run as `fedpeft run verify` does."""
    who = Identity.load(identity) if identity else None
    session: Any = SimpleNamespace(client=lambda: OperatorClient(f"127.0.0.1:{port}", who))
    found = asyncio.run(verified(session, run, spool, lambda _: None))
    print(json.dumps({"verified": len(found["rounds"])}), flush=True)
    return 0


class _Operator:
    def __init__(self, port: int, said: Path, identity: Path | None) -> None:
        self._identity = Identity.load(identity) if identity else None
        self._server = f"127.0.0.1:{port}"
        self._said = said.open("a", buffering=1)
        self._stop = said.with_name("stop")

    def _say(self, **what: Any) -> None:
        self._said.write(json.dumps({"at": time.monotonic(), **what}) + "\n")

    async def operate(self, config: RunConfig) -> None:
        tensors = {t.name: np.zeros(t.shape, np.float32) for t in SPEC.shared}
        run = await self._insist(lambda c: c.create_run(config, SPEC, "ab" * 32, tensors, 1000, request_id="chaos"))
        named, version = run.id, 0
        self._say(run=named)
        while run.state != run_pb2.RUN_STATE_COMPLETED:
            if self._stop.exists():
                await self._insist(lambda c: c.stop(named))
                self._say(stopped=True)
                return
            if run.state == run_pb2.RUN_STATE_PAUSED:
                self._say(paused=run.reason)
                await self._insist(lambda c: c.resume(named), tries=1)
            await asyncio.sleep(0.2)
            run, _ = await self._insist(lambda c: c.run(named))
            if run.version > version:
                version = run.version
                self._say(version=version)
        self._say(completed=run.version)

    async def _insist(self, call: Any, tries: int = 10_000) -> Any:
        for _ in range(tries):
            try:
                async with OperatorClient(self._server, self._identity, attempts=2) as client:
                    client.timeout_s = 3.0
                    return await call(client)
            except FedpeftError:
                await asyncio.sleep(0.2)
        return None
