"""Read by every Python that a test starts: what is ours is then a fork of one process.

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
        "fedpeft_client": True,
        "fedpeft_client.worker.process": True,
        "fedpeft.simulation.worker": True,
        "fedpeft_server": True,
        "fedpeft_operator.app": "top" not in _arguments,
    }
    if _forked.get(_module):
        from fedpeft_tests_launcher import launch

        launch(_folder, _module, _arguments)
