"""Places that several daemons of a world share: a PostgreSQL of the world's own, and a bucket of an S3.

The PostgreSQL is a machine like the others. The S3 keeps its buckets in memory: to the daemons it is away, or started
again, while its line is cut, and it stands still while that is stalled.
"""

from __future__ import annotations

import atexit
import functools
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from server import object_store

from . import processes
from .machines import Machine
from .schedule import POSTGRES, S3

_LIMITS = ("fsync=off", "shared_buffers=16MB", "max_connections=80", "unix_socket_directories=")
STARTS_S = 20.0


def prepare() -> None:
    """Makes what the worlds of this process begin with; called before one is forked."""
    _cluster()


class SharedPlaces:
    """The places of one world.

    Args:
        place: The world's folder.
        port: The port of its PostgreSQL.

    Attributes:
        s3: The process of the S3, which ends with this one.
    """

    def __init__(self, place: Path, port: int) -> None:
        self._port = port
        self._s3_port = _free_port()
        self.s3 = _start_s3(self._s3_port)
        self._bucket = f"chaos-{place.name.removeprefix('chaos-').replace('_', '-').lower()}-{time.monotonic_ns()}"
        place.chmod(0o711)  # PostgreSQL has a user of its own
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._s3_port}/{self._bucket}", method="PUT", headers={"Host": "s3.amazonaws.com"}
        )
        with urllib.request.urlopen(request, timeout=STARTS_S):
            pass

    def links(self, daemons: Iterable[str]) -> dict[str, list[int]]:
        """Returns the lines on which daemons reach the places, and the ports that these lead to."""
        return {S3: [self._s3_port], **{f"{daemon}/{POSTGRES}": [self._port] for daemon in daemons}}

    def machine(self, place: Path, drawn: random.Random) -> Machine:
        """Returns the machine of the PostgreSQL; it ends by SIGQUIT as by `pg_ctl -m immediate`, and then recovers."""

        def ready(disk: Path) -> None:
            disk.rmdir()
            subprocess.run(["cp", "-a", _cluster(), disk], check=True)

        main = functools.partial(_serve, port=self._port, log=place / "logs" / "postgres.txt")
        return Machine(POSTGRES, place, drawn, main, prepare=ready, own_disk=False, leaves_by=signal.SIGQUIT)

    def await_postgres(self) -> None:
        """Waits until the database takes connections."""
        _await(self._port)

    def flags(self, postgres_port: int) -> list[str]:
        """Returns the flags of a daemon that reaches the database at a port."""
        database = f"postgresql://postgres@127.0.0.1:{postgres_port}/postgres"
        return ["--database", database, "--blobs", f"s3://{self._bucket}", "--updates", f"s3://{self._bucket}"]

    def environment(self, s3_port: int = 0) -> Mapping[str, str]:
        """Returns the variables with which a process finds the S3, at its own port or at that of a line."""
        return {**object_store.ACCESS, "AWS_ENDPOINT": f"http://127.0.0.1:{s3_port or self._s3_port}"}

    def read(self) -> Any:
        """Opens the database, beside all lines."""
        import psycopg

        return psycopg.connect(host="127.0.0.1", port=self._port, user="postgres", dbname="postgres", autocommit=True)

    def gather(self, folders: Iterable[Path], data: Path) -> None:
        """Makes one data folder: of the bucket, and of the manifests that only the spools of the daemons have."""
        from obstore.store import S3Store

        (data / "spool").mkdir(parents=True)
        for folder in folders:
            for manifest in folder.glob("spool/*.manifest"):
                shutil.copy(manifest, data / "spool")
        access = {name.lower(): value for name, value in self.environment().items()}
        store: Any = S3Store(self._bucket, config=access)  # type: ignore[arg-type]
        for batch in store.list():
            for found in batch:
                key = str(found["path"])
                _, *update = key.split("/") if key.startswith("updates/") else [key]
                file = data / "spool" / f"{'.'.join(update)}.update" if update else data / "blobs" / key
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(bytes(store.get(key).bytes()))


def _start_s3(port: int) -> int:
    """Starts an S3; returns its process."""
    program = object_store.program()
    assert program is not None
    command = [program, "-H", "127.0.0.1", "-p", str(port)]
    started = processes.start(lambda: os.execv(command[0], command), Path(os.devnull))
    until = time.monotonic() + STARTS_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return started


@functools.cache
def _cluster() -> Path:
    """Makes a PostgreSQL with the schema of a server, for copies; returns its folder."""
    root = Path(tempfile.mkdtemp(prefix="chaos-postgres-"))
    owner = os.getpid()
    atexit.register(lambda: shutil.rmtree(root, ignore_errors=True) if os.getpid() == owner else None)
    folder, user = root / "data", _user()
    os.chown(root, user.pw_uid, user.pw_gid)
    made = ["initdb", "-D", folder, "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync", "--wal-segsize=1"]
    asked = {"user": user.pw_uid, "group": user.pw_gid} if os.geteuid() == 0 else {}
    subprocess.run(made, check=True, cwd=root, stdout=subprocess.DEVNULL, **asked)  # type: ignore[call-overload]
    port = _free_port()
    pid = processes.start(lambda: _serve(root, port=port, log=root / "log"), root / "log")
    _await(port)
    migrating = processes.start(lambda: _migrate(port), root / "migration")
    failed = os.waitpid(migrating, 0)[1]
    os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)
    if failed:
        raise RuntimeError((root / "migration").read_text())
    return folder


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _migrate(port: int) -> int:
    from fedpeft_server.store.database import Database
    from fedpeft_server.timing import TIMING

    Database.open(f"postgresql://postgres@127.0.0.1:{port}/postgres", TIMING).close()
    return 0


def _user() -> pwd.struct_passwd:
    """Returns the user that runs PostgreSQL, which does not run as root."""
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def _serve(disk: Path, port: int, log: Path) -> int:
    """Becomes the PostgreSQL of a folder, and its user."""
    written, user, parent = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), _user(), os.getppid()
    for stream in (1, 2):
        os.dup2(written, stream)
    folder = disk if (disk / "PG_VERSION").exists() else disk / "data"
    if os.geteuid() == 0:
        os.initgroups(user.pw_name, user.pw_gid)
        os.setgid(user.pw_gid)
        os.setuid(user.pw_uid)
    processes.die_with(parent)  # again: another user is not killed for what the first one asked for
    limits = [part for limit in _LIMITS for part in ("-c", limit)]
    command = ["postgres", "-D", str(folder), "-h", "127.0.0.1", "-p", str(port), *limits]
    os.execvp(command[0], command)


def _await(port: int) -> None:
    import psycopg

    until = time.monotonic() + STARTS_S
    while True:
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="postgres", dbname="postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
        else:
            return
