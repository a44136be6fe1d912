"""Read by every Python that a test starts: a client's worker is then a fork of a process that has torch already.

Importing torch, torchvision and timm takes seconds of processor time, of every worker of every test; a worker does
nothing else that depends on it. Without the variable nothing happens.
"""

import os
import sys

_folder = os.environ.get("FEDPEFT_TESTS_PRELOADED")
if _folder and sys.orig_argv[-2:] == ["-m", "fedpeft_client.worker"]:
    from fedpeft_tests_launcher import launch

    launch(_folder)
