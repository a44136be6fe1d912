"""The start of a command: Ctrl-C while its modules are imported ends it without a traceback."""

from __future__ import annotations

import signal
from importlib import import_module


def begin(module: str) -> None:
    """Imports a module and runs its `main`."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = import_module(module).main
    signal.signal(signal.SIGINT, handler)
    main()
