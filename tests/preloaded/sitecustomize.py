"""Imported by every Python that a test starts: the processes of FedPEFT become forks of one process.

Importing torch, torchvision and timm takes seconds of processor time, of every worker and every `fedpeft run create` of
every test, and importing what servers, agents and other commands need takes one or two; nothing else that these do
depends on it. `fedpeft top` is a process of its own: it draws on the terminal of its session. Without the variable
nothing happens.
"""

import os
import sys

_folder = os.environ.get("FEDPEFT_TESTS_PRELOADED")
if _folder and sys.orig_argv[1:2] == ["-m"]:
    _module, _arguments = sys.orig_argv[2], sys.orig_argv[3:]
    _forked = {
        "fedpeft_client",
        "fedpeft_client.worker.process",
        "fedpeft.simulation.worker",
        "fedpeft_server",
        "fedpeft_operator.app",
        "fedpeft_tests_program",
    }
    if _module in _forked and not (_module == "fedpeft_operator.app" and "top" in _arguments):
        from fedpeft_tests_launcher import launch

        launch(_folder, _module, _arguments)
