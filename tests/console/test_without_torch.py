"""The console where torch is not installed: it shows everything, and says that a run is created elsewhere."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = """
import sys
sys.modules["torch"] = None  # as if it were not installed
from fedpeft_operator.console import app, run_file, serving
print(run_file.missing_part())
print([name for name in ("timm", "fedpeft_server", "fedpeft_client") if name in sys.modules])
"""


def test_a_console_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    missing, loaded = done.stdout.splitlines()
    assert "torch is not installed beside this console" in missing
    assert "fedpeft run create FILE" in missing
    assert loaded == "[]"
