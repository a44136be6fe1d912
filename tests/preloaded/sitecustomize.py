"""Read by every Python that a test starts: workers and short commands are then forks of one process.

Importing torch, torchvision and timm takes seconds of processor time, of every worker and every `fedpeft run create` of
every test, and importing what other commands need takes one; nothing else that these do depends on it. Servers, agents
and commands that stay are processes of their own. Without the variable nothing happens.
"""

import os
import sys

_folder = os.environ.get("FEDPEFT_TESTS_PRELOADED")
if _folder and sys.orig_argv[1:2] == ["-m"]:
    _module, _arguments = sys.orig_argv[2], sys.orig_argv[3:]
    _forked = {
        "fedpeft_client": _arguments[:1] in (["enroll"], ["leave"], ["ledger"], ["status"]),
        "fedpeft_client.worker.process": True,
        "fedpeft.simulation.worker": True,
        "fedpeft_operator.app": not {"console", "top"} & {*_arguments},
    }
    if _forked.get(_module):
        from fedpeft_tests_launcher import launch

        launch(_folder, _module, _arguments)
