"""The end of a parent's run at an edge: the edge's run gets its last version, or is stopped."""

from __future__ import annotations

from google.protobuf import json_format

from fedpeft.errors import FedpeftError, IdentityInvalid, StateInvalid
from fedpeft.process.logs import Log
from fedpeft.v1 import run_pb2
from fedpeft_client.state.adapters import AdapterCache
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.pull import Puller
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.worker.handle import Answer, WorkerProcess
from fedpeft_client.worker.trainer import adapter_json


class EdgeEnd:
    """Ends runs at the edge.

    Args:
        worker: The worker of the relay.
        channel: The parent's server.
        retry: Repeats its calls.
        directory: The client's memory.
        log: Log of the client.
    """

    def __init__(
        self, worker: WorkerProcess, channel: Channel, retry: Retry, directory: StateDirectory, log: Log
    ) -> None:
        self._worker = worker
        self._channel = channel
        self._retry = retry
        self._directory = directory
        self._log = log

    async def __call__(self, run: str, how: str) -> bool:
        """Ends the edge's run of a parent's run that is over; returns False if that must be tried again.

        Args:
            run: The run.
            how: Completed, stopped or deleted.

        Raises:
            IdentityInvalid: If the edge's server does not let this relay in.
            StateInvalid: If the state directory cannot be written.
        """
        request: Answer = {"op": "finished", "run": {"id": run}, "how": how}
        try:
            answer = await self._worker.ask(request)
            if "wants" in answer:
                known = KnownRun.of(json_format.ParseDict(answer["wants"], run_pb2.Run()), of_sums=True)
                cache = AdapterCache(self._directory.run(run))
                last = await Puller(self._channel, self._retry, known, cache).pull(known.config.rounds.count)
                answer = await self._worker.ask(request | {"adapter": adapter_json(last)})
        except (IdentityInvalid, StateInvalid):
            raise
        except FedpeftError as error:  # the worker died, which is logged, or the parent does not give the version
            self._log.warning("the edge's run could not be ended; trying again later", run=run, cause=str(error))
            return False
        return bool(answer["done"])
