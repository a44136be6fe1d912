"""Stands for a process: hands its streams to a fork of the preloaded process, and ends as that one ends.

Who kills this process kills the fork: the kernel sends it the same signal as the connection of this process ends, and
the preloaded process takes no next fork before that one is gone.
"""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STATUS_BYTES = 4
START_S = 120.0
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that the fork gets in place of this process."""
LIMITS = {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
"""Numbers of the resource limits, some of which have two names."""


def launch(folder: str, module: str, arguments: list[str]) -> None:
    """Becomes a fork of the preloaded process of a folder; starts that one if it is the first.

    Returns where a fork would be another process than the one that was wanted: of another user, in another root
    directory, or after the end of the tests.
    """
    if not _same_place(Path(folder)):
        return
    ignored = [each for each in PASSED_ON if signal.getsignal(each) is signal.SIG_IGN]
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until it is known to whom
    line = _connect(Path(folder))
    limits = [(limit, resource.getrlimit(limit)) for limit in LIMITS]
    request = {
        "module": module,
        "arguments": arguments,
        "folder": os.getcwd(),
        "path": sys.path,
        "environment": dict(os.environ),
        "limits": limits,
        "ignored": ignored,
        "umask": _umask(),
    }
    encoded = json.dumps(request).encode()
    life, ours = socket.socketpair()  # ends with this process, and carries nothing
    socket.send_fds(line, [len(encoded).to_bytes(STATUS_BYTES, "little")], [0, 1, 2, life.fileno()])
    life.close()
    line.sendall(encoded)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)  # the ends of both are the fork's to close
    fork = int.from_bytes(line.recv(STATUS_BYTES, socket.MSG_WAITALL), "little")
    if fork:
        (Path(folder) / f"fork-of-{os.getpid()}").write_text(str(fork))  # for tests that look at the process itself
    for each in PASSED_ON if fork else ():
        signal.signal(each, lambda number, _: os.kill(fork, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = line.recv(STATUS_BYTES, socket.MSG_WAITALL)
    ours.close()
    code = int.from_bytes(status, "little", signed=True) if len(status) == STATUS_BYTES else 1
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def await_preloaded(folder: str) -> None:
    """Returns once the preloaded process of a folder has imported everything; starts it if there is none."""
    with _connect(Path(folder)) as line:
        line.shutdown(socket.SHUT_WR)
        line.recv(1)


def _umask() -> int:
    """Returns the mode mask, which can only be read by setting another one."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _same_place(folder: Path) -> bool:
    try:
        return folder.stat().st_uid == os.getuid() and (folder / "namespace").read_text() == namespace()
    except OSError:
        return False


def namespace() -> str:
    """Returns a name of this process's view of the file system: its mounts and its root directory."""
    return os.readlink("/proc/self/ns/mnt") + os.readlink("/proc/self/root")


def _connect(folder: Path) -> socket.socket:
    until = time.monotonic() + START_S
    while True:
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(str(folder / "socket"))
            return line
        except OSError:
            line.close()
            if time.monotonic() > until:
                raise
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "socket").exists():
                _start(folder)
        time.sleep(0.02)


def _start(folder: Path) -> None:
    """Starts the preloaded process, which listens before it imports anything large."""
    server = Path(__file__).with_name("fedpeft_tests_preloaded.py")
    nothing = subprocess.DEVNULL
    with (folder / "log").open("wb") as log:
        command = [sys.executable, str(server), str(folder)]
        subprocess.run(command, stdin=nothing, stdout=log, stderr=log, start_new_session=True, check=True)
    until = time.monotonic() + START_S
    while not (folder / "socket").exists():
        if time.monotonic() > until:
            raise RuntimeError(f"the preloaded process did not start: {(folder / 'log').read_text()}")
        time.sleep(0.01)
