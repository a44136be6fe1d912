"""`fedpeft-server`: the daemon, and the commands beside it, which make and replace its certificates.

Exit codes: 0 done, or stopped by a signal; 1 failed; 2 wrong settings.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import sys
from importlib import import_module
from typing import NoReturn

from fedpeft.errors import FedpeftError, IdentityInvalid, SettingsInvalid, StateInvalid
from fedpeft.process import durable
from fedpeft.process.logs import configure
from fedpeft.process.start import check_command, naming_arguments, note, to_the_end
from fedpeft.rpc import grpc_core
from fedpeft.untrusted_text import print_anything
from fedpeft_server.settings import Settings
from fedpeft_server.tasks import leave_behind
from fedpeft_server.timing import TIMING

COMMANDS = {
    "init": ("fedpeft_server.commands.init", "make the certificates of server and operator"),
    "certificate": ("fedpeft_server.commands.certificate", "show the server's certificate, or make another one"),
    "authority": (
        "fedpeft_server.commands.authority",
        "show the authority, or replace it while clients stay connected",
    ),
    "check": ("fedpeft_server.commands.check", "verify all that a stopped server has"),
    "backup": ("fedpeft_server.commands.backup", "copy a server's data while it works"),
    "restore": ("fedpeft_server.commands.restore", "put a backup back into a new folder, and check it"),
}
"""By the word that stands first on the command line: the module, imported only then, and a line for `--help`."""

COLLECTED = (7000, 10, 100)
"""Thresholds of the garbage collector, the first and the last ten times as high as the interpreter's.

A full collection visits every object of every client that waits: it stops the server for more than a second with 10,000
of them, and finds next to nothing."""

KEPT_BYTES = 8 * 1024 * 1024
"""Free memory that each of the C library's heaps keeps, and the largest buffer that comes from one.

By glibc's defaults a heap gives back to the system what is free at its end beyond about two chunks, so that the buffer
of the next chunk begins with 256 page faults: as much work as its digest."""
_ADJUSTED = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
"""Parameters of mallopt (3), by the variables of the environment that set them too."""


def main() -> None:
    """Runs the daemon until SIGTERM or SIGINT."""
    arguments = sys.argv[1:]
    print_anything()
    try:
        with durable.naming_files(), to_the_end("fedpeft-server"), naming_arguments(arguments):
            if arguments and arguments[0] in COMMANDS:
                module, _ = COMMANDS[arguments[0]]
                sys.exit(import_module(module).main(arguments[1:]))
            check_command(arguments, COMMANDS)
            settings = _settings(arguments)
        configure(settings.log_format, settings.log_level)
        grpc_core.configure()
        from fedpeft_server.app import run  # only now: gRPC reads the environment as it is imported

        gc.set_threshold(*COLLECTED)
        keep_memory()
        asyncio.run(run(settings, TIMING))
        leave_behind(0)
    except KeyboardInterrupt:  # before the daemon itself looks after its signals
        note("fedpeft-server: interrupted")
        sys.exit(130)
    except (SettingsInvalid, StateInvalid, IdentityInvalid) as error:
        _fail(error, 2)
    except FedpeftError as error:
        _fail(error, 1)


def keep_memory() -> None:
    """Has the C library keep what the next chunk needs again, where that is glibc, unless the environment decides."""
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    for name, parameter in _ADJUSTED.items():
        if adjust is not None and name not in os.environ:
            adjust(parameter, KEPT_BYTES)


def _settings(arguments: list[str]) -> Settings:
    try:
        return Settings.read(arguments)
    except SystemExit:
        if "-h" in arguments or "--help" in arguments:
            print("\ncommands, each with a --help of its own (fedpeft-server COMMAND ...):")
            for word, (_, purpose) in COMMANDS.items():
                print(f"  {word:<12} {purpose}")
        raise


def _fail(error: FedpeftError, code: int) -> NoReturn:
    note(f"fedpeft-server: {error.message}")
    leave_behind(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
