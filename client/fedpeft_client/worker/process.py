"""The worker: the process that holds torch, the model and the data, and answers the agent in JSON lines.

That of a relay has none of them, and calls the edge's server.

Requests come on stdin, one object a line: `open` (first), `survey`, `check`, `train`, `evaluate`, `finished` (a run is
over, for a relay), `stop`. Answers go to the original stdout: `{"progress": ...}` any number of times, then
`{"result": ...}` or `{"error": ...}`; and `{"dying": WHY}` and the end of the stream mean that the process cannot be
trusted any more. Tensors pass through files.
Whatever a library prints goes to stderr. The end of stdin means that the agent is gone: the process ends at once.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, TextIO, cast

import structlog

from fedpeft.errors import FedpeftError, StateInvalid
from fedpeft.process import durable, logs
from fedpeft.rpc import grpc_core

Message = dict[str, Any]
CANNOT_GO_ON = 70
"""Exit code after an error that nobody foresaw."""


def main() -> None:
    """Answers requests until the agent says stop or is gone."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # sent to the whole group; the agent decides when to stop
    requests, answers = _take_streams()
    inbox: queue.Queue[Message | None] = queue.Queue()
    stopping = threading.Event()
    threading.Thread(target=_read, args=(requests, inbox, stopping), daemon=True).start()
    worker = _Worker(answers, stopping.is_set)
    while (request := inbox.get()) is not None and not stopping.is_set():
        worker.answer(request)
    os._exit(0)  # as at the end of stdin: nothing is left to write, and to take torch down takes seconds


def _take_streams() -> tuple[TextIO, TextIO]:
    """Returns the protocol's two streams, and leaves /dev/null and stderr in their place."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return requests, answers


def _read(requests: TextIO, inbox: queue.Queue[Message | None], stopping: threading.Event) -> None:
    """Passes requests on; runs beside the computation so that a stop is seen between two steps."""
    for line in requests:
        request = json.loads(line)
        if request["op"] == "stop":
            stopping.set()
            inbox.put(None)
        else:
            inbox.put(request)
    os._exit(0)


class _Worker:
    """Answers requests one at a time."""

    def __init__(self, answers: TextIO, stopping: Callable[[], bool]) -> None:
        self._answers = answers
        self._stopping = stopping
        self._site: Any = None

    def answer(self, request: Message) -> None:
        """Does what is asked and sends the result, or the error; ends the process after an unforeseen one."""
        try:
            self._send({"result": self._do(request)})
        except FedpeftError as error:
            self._send({"error": _error(error)})
        except OSError as error:
            text = f"cannot read or write {error.filename or 'a file'}: {durable.in_words(error)}"
            self._send({"error": _error(StateInvalid(text))})
        except Exception as error:  # CUDA may be unusable from here on: a fresh process is the only cure
            traceback.print_exc()
            self._send({"dying": f"{type(error).__name__}: {error}"})
            os._exit(CANNOT_GO_ON)

    def _do(self, request: Message) -> Message:
        op = request["op"]
        if op == "open":
            return self._open(request)
        if op == "survey":
            return _awaited(self._site.survey(self._progress))
        structlog.contextvars.bind_contextvars(run=request["run"]["id"])
        if op == "check":
            return _awaited(self._site.check(request))
        if op == "evaluate":
            return _awaited(self._site.evaluate(request, self._progress))
        if op == "finished":
            return _awaited(self._site.finished(request))
        with structlog.contextvars.bound_contextvars(round=request["round"]):
            return _awaited(self._site.train(request, self._progress, self._stopping))

    def _open(self, request: Message) -> Message:
        logs.configure(request["log_format"], "debug" if request["verbose"] else "info")
        structlog.contextvars.bind_contextvars(client=request["client"])
        if request.get("relay"):
            grpc_core.configure()
            from fedpeft_client.relay.worker import RelayWorker  # gRPC, which a client with data computes without

            self._site = RelayWorker(request)
        else:
            from fedpeft_client.worker.tasks import SiteWorker  # torch: seconds, and it may print

            self._site = SiteWorker(request)
        return _awaited(self._site.hello())

    def _progress(self, progress: Message) -> None:
        self._send({"progress": progress})

    def _send(self, message: Message) -> None:
        try:
            self._answers.write(json.dumps(message) + "\n")
            self._answers.flush()
        except BrokenPipeError:
            os._exit(0)  # the agent is gone


def _awaited(answer: Any) -> Message:
    """Returns an answer; that of a relay, which calls a server, is awaited on an event loop of its own."""
    return cast(Message, asyncio.run(answer) if inspect.iscoroutine(answer) else answer)


def _error(error: FedpeftError) -> Message:
    return {"reason": error.reason, "message": error.message, "fields": list(error.fields)}


if __name__ == "__main__":
    main()
