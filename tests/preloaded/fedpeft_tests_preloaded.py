"""The preloaded process: it has imported what servers, clients and commands import, and forks one for each.

It ends when its folder is removed, or the process of the tests is gone. It is nobody's child: the first worker of all
starts it, and a test that looks whether all descendants of a command have ended must not find it among them.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedpeft_tests_launcher import STATUS_BYTES

F_SETSIG = 10
"""Of Linux; `fcntl` has no name for it."""
LOOK_S = 1.0
"""Time after which an idle process looks whether its folder and the tests are still there."""
IMPORTED = (
    "fedpeft_client.app",
    "fedpeft_client.commands.enroll",
    "fedpeft_client.commands.leave",
    "fedpeft_client.commands.ledger",
    "fedpeft_client.commands.status",
    "fedpeft_operator.app",
    "fedpeft_operator.console.serving",
    "fedpeft.api.operator_client",
    "fedpeft_client.worker.process",
    "fedpeft_client.worker.tasks",
    "fedpeft.simulation",
    "fedpeft.simulation.local_trainer",
    "fedpeft.algorithms.plain",
    "fedpeft.data.dataset",
    "fedpeft.models.families",
    "fedpeft.models.tasks.image_classification",
    "fedpeft.peft.tuners.lora",
    "fedpeft.rounds.policies.synchronous",
    "fedpeft.simulation.engines.inprocess",
    "fedpeft_server.__main__",
    "fedpeft_server.app",
    "peft",
    "timm",
    "torch._dynamo",
)
"""Modules that a fork need not import."""


def main() -> None:
    """Serves until the folder that it was given is removed."""
    if os.fork():
        os._exit(0)
    folder = Path(sys.argv[1])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket.new"))
    listener.listen(64)
    (folder / "socket.new").rename(folder / "socket")
    from fedpeft.rpc import grpc_core

    grpc_core.configure()  # as each command does before it imports gRPC
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # what a fork's collections visit would be copied for it

    woken, wakes = socket.socketpair()
    woken.setblocking(False)
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    children: dict[int, socket.socket] = {}
    tests = Path("/proc", (folder / "tests").read_text())
    while folder.exists() and tests.exists():
        ready, _, _ = select.select([listener, woken, *children.values()], [], [], LOOK_S)
        if woken in ready:
            woken.recv(4096)
        _reap(children)
        for pid, line in list(children.items()):
            if line in ready and line.fileno() >= 0 and not line.recv(1):
                os.kill(pid, signal.SIGKILL)  # the one it stands for was killed
                os.waitpid(pid, 0)
                children.pop(pid).close()
        if listener in ready:
            line, _ = listener.accept()
            _fork(line, children, (listener, woken, wakes))
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


def _reap(children: dict[int, socket.socket]) -> None:
    """Passes on the exit codes of the forks that have ended."""
    for pid in list(children):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            with children.pop(pid) as line, suppress(OSError):  # the one it stands for was killed in the same moment
                line.sendall(code.to_bytes(STATUS_BYTES, "little", signed=True))


def _fork(line: socket.socket, children: dict[int, socket.socket], own: tuple[socket.socket, ...]) -> None:
    """Forks for the process at the other end of a connection; the fork never returns."""
    size, received, _, _ = socket.recv_fds(line, STATUS_BYTES, 4)
    if len(size) < STATUS_BYTES:  # it was killed, or asks for no process
        line.close()
        return
    *streams, life = received
    request = json.loads(line.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid:
        for stream in (*streams, life):
            os.close(stream)
        children[pid] = line
        with suppress(OSError):  # it was killed meanwhile, which the end of the line says
            line.sendall(pid.to_bytes(STATUS_BYTES, "little"))
        return
    try:
        _take_signals(request["ignored"])
        for each in (line, *own, *children.values()):
            each.close()
        _die_with(life)
        _take_streams(streams)
        _take_environment(request)
        code = _run(request["module"], request["arguments"])
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as at the end of any process
        os._exit(code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _take_signals(ignored: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)
    for each in ignored:
        signal.signal(each, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _take_streams(streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    # Those that there are know where in the log they were.
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)


def _take_environment(request: dict[str, Any]) -> None:
    os.chdir(request["folder"])
    os.umask(request["umask"])
    for limit, (soft, hard) in request["limits"]:
        resource.setrlimit(limit, (soft, hard))
    os.environ.clear()
    os.environ.update(request["environment"])
    time.tzset()
    sys.path[:] = request["path"]
    importlib.invalidate_caches()


def _die_with(life: int) -> None:
    """Has the kernel send SIGKILL to this process in the moment in which the one it stands for ends.

    The preloaded process sees the end of the connection as well, but later: a server that was killed could meanwhile
    answer another call.
    """
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(life, fcntl.F_SETFL, fcntl.fcntl(life, fcntl.F_GETFL) | os.O_ASYNC)


def _run(module: str, arguments: list[str]) -> int:
    """Runs a module as `python -m` does; returns its exit code."""
    sys.argv = [module, *arguments]
    sys.orig_argv = [sys.executable, "-m", *sys.argv]
    try:
        sys.modules.pop(f"{module}.__main__" if hasattr(sys.modules.get(module), "__path__") else module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
