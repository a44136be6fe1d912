"""Read by every Python that a test starts: what needs torch is then a fork of a process that has it already.

Importing torch, torchvision and timm takes seconds of processor time, of every worker and every `fedpeft run create` of
every test, and nothing else that these do depends on it. Without the variable nothing happens.
"""

import os
import sys

_folder = os.environ.get("FEDPEFT_TESTS_PRELOADED")
if _folder and sys.orig_argv[1:2] == ["-m"]:
    _module, _arguments = sys.orig_argv[2], sys.orig_argv[3:]
    _torch_wanted = {
        "fedpeft_client.worker.process": True,
        "fedpeft.simulation.worker": True,
        "fedpeft_operator.app": bool({"create", "simulate"} & {*_arguments}),
    }
    if _torch_wanted.get(_module):
        from fedpeft_tests_launcher import launch

        launch(_folder, _module, _arguments)
