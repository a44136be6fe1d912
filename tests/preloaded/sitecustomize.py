"""Imported by every Python that a test starts: the processes of FedPEFT become forks of one process.

Importing torch, torchvision and timm takes seconds of processor time, of every worker and every `fedpeft run create` of
every test, and importing what servers, agents and other commands need takes one or two; nothing else that these do
depends on it. `fedpeft top` is a process of its own: it draws on the terminal of its session. Without the variable
nothing happens.
"""

import os
import sys

FORKED = {
    "fedpeft_client",
    "fedpeft_client.worker.process",
    "fedpeft.simulation.worker",
    "fedpeft_server",
    "fedpeft_operator.app",
    "fedpeft_tests_program",  # a program of a test
}
"""Modules that are run with `python -m`."""
SCRIPTS = {"fedpeft": "fedpeft_operator.app", "fedpeft-server": "fedpeft_server", "fedpeft-client": "fedpeft_client"}
"""Modules that the installed commands run."""

_folder = os.environ.get("FEDPEFT_TESTS_PRELOADED")
if _folder and len(sys.orig_argv) > 1:
    _, _first, *_arguments = sys.orig_argv
    if _first == "-m" and _arguments:
        _module, *_arguments = _arguments
    else:
        _directory, _name = os.path.split(_first)
        _module = SCRIPTS.get(_name, "") if _directory == os.path.dirname(sys.executable) else ""
    if _module in FORKED and not (_module == "fedpeft_operator.app" and "top" in _arguments):
        from fedpeft_tests_launcher import launch

        launch(_folder, _module, _arguments)
