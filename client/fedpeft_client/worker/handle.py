"""The worker as the agent sees it: a process that is started when needed, asked in JSON lines, restarted after a crash.

The agent itself never imports torch, so the connection stays alive while the worker computes, and whatever takes the
worker down (CUDA, the memory killer) leaves the agent standing.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fedpeft import errors
from fedpeft.errors import FedpeftError, TrainingFailed
from fedpeft.process.logs import Log
from fedpeft_client.timing import TIMING, Timing

ATTEMPTS = 3
"""Most attempts at a request of which the worker dies."""
LINE_LIMIT_BYTES = 64 * 1024 * 1024
"""Longest answer; figures of 100,000 classes are well below."""

_COMMAND = (sys.executable, "-m", "fedpeft_client.worker.process")

Answer = dict[str, Any]
OnProgress = Callable[[Answer], None]


class WorkerDied(Exception):
    """The worker ended without an answer."""


class WorkerProcess:
    """One worker, started with `options` as its first request.

    Args:
        options: The `open` request, see `worker.process`.
        log: Log for crashes.
        timing: The client's.
    """

    def __init__(self, options: Answer, log: Log, timing: Timing = TIMING) -> None:
        self.timing = timing
        self._options = options
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._moving, self._silent_s = False, 0.0
        self.hello: Answer = {}

    async def start(self) -> Answer:
        """Starts the worker if it is not there, and returns what it said of itself (device, threads, versions).

        Raises:
            FedpeftError: What the worker raised, for example `DataInvalid`.
            TrainingFailed: If it died ATTEMPTS times.
        """
        return await self._insist(None, lambda _: None)

    async def ask(self, request: Answer, on_progress: OnProgress = lambda _: None) -> Answer:
        """Returns the worker's answer; a worker that dies is started again and asked again.

        Raises:
            FedpeftError: What the worker raised.
            TrainingFailed: If it died ATTEMPTS times.
        """
        return await self._insist(request, on_progress)

    async def close(self) -> None:
        """Asks the worker to stop at its next step; kills it if it does not in time."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with suppress(ConnectionError):  # it has ended already
            process.stdin.write(b'{"op": "stop"}\n')
            await process.stdin.drain()
        try:
            async with asyncio.timeout(self.timing.worker_leave_s):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()
        _close_pipes(process)

    async def _insist(self, request: Answer | None, on_progress: OnProgress) -> Answer:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                if self._process is None:
                    await self._open()
                return self.hello if request is None else await self._exchange(request, on_progress)
            except asyncio.CancelledError:
                await self.close()  # it is in the middle of an answer that nobody waits for
                raise
            except WorkerDied as death:
                self._log.error("worker died", cause=str(death), attempt=attempt, of=ATTEMPTS)
                cause = death
        raise TrainingFailed(f"the worker process died {ATTEMPTS} times; the last time {cause}")

    async def _open(self) -> None:
        if relay := self._options.get("relay"):
            self._log.info("relaying for the clients of a server", relay=relay["server"])
        else:
            self._log.info("loading torch and the data", data=self._options["data"])
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", **os.environ}  # repeatable on a GPU
        self._process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_LIMIT_BYTES,
            env=environment,
        )
        try:
            self.hello = await self._exchange(self._options, lambda _: None)
        except FedpeftError:
            await self.close()
            raise

    async def _exchange(self, request: Answer, on_progress: OnProgress) -> Answer:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerDied("it is not running")
        self._moving, self._silent_s = False, 0.0
        with suppress(ConnectionError):  # then the end of its answers says what happened
            process.stdin.write(json.dumps(request).encode() + b"\n")
            await process.stdin.drain()
        why = ""
        while line := await self._line(process, process.stdout):
            answer: Answer = json.loads(line)
            if "progress" in answer:
                self._moving = self._moving or bool(answer["progress"].get("step"))
                on_progress(answer["progress"])
            elif "error" in answer:
                raise _error(answer["error"])
            elif "result" in answer:
                result: Answer = answer["result"]
                return result
            else:
                why = f" after {answer['dying']}"
        self._process = None
        code = await process.wait()
        _close_pipes(process)
        if self._silent_s >= self._longest_s:
            why = f" after {self._silent_s:g} seconds without a word"
        raise WorkerDied(_cause(code) + why)

    @property
    def _longest_s(self) -> float:
        """The worker may give no word for so long."""
        return self.timing.away_s if self._moving else self.timing.load_s

    async def _line(self, process: asyncio.subprocess.Process, stream: asyncio.StreamReader) -> bytes:
        """Returns the next line, empty at the end, where death may have cut one off.

        Says so when none comes, and ends a worker that gives none for too long.
        """
        self._silent_s = 0.0
        while True:
            try:
                async with asyncio.timeout(self.timing.stall_s):
                    line = await stream.readline()
                    return line if line.endswith(b"\n") else b""
            except TimeoutError:
                self._silent_s += self.timing.stall_s
                self._log.warning("worker is silent", seconds=self._silent_s)
            if self._silent_s >= self._longest_s:
                process.kill()


def _close_pipes(process: asyncio.subprocess.Process) -> None:
    """Closes our ends of a dead worker's pipes now and not at garbage collection."""
    if process.stdin is not None:
        process.stdin.close()


def _error(data: Answer) -> FedpeftError:
    """Returns the error that the worker raised, as an instance of the same class."""
    cls = errors.of_reason(data["reason"], TrainingFailed)
    return cls(data["message"], tuple((path, text) for path, text in data["fields"]))


def _cause(code: int) -> str:
    if code < 0:
        with suppress(ValueError):  # a real-time signal has no name
            return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}"
