"""Every line of a log is a line of the log."""

from __future__ import annotations

import json
import subprocess
import sys

SAYS = """
import logging, warnings
from fedpeft.process import logs
logs.configure("json", "info")
warnings.warn("from a\\nlibrary")
logging.getLogger("timm.models").warning("said %d times", 3)
logging.getLogger("timm.models").info("of no interest")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("asyncio").exception("never retrieved")
logs.logger(client="site-a").info("ours")
"""


def test_what_libraries_say_is_in_the_form_of_the_log() -> None:
    said = subprocess.run([sys.executable, "-c", SAYS], capture_output=True, text=True, check=True).stderr
    lines = [json.loads(line) for line in said.splitlines()]
    assert [(line["level"], line["event"], line.get("library")) for line in lines] == [
        ("warning", "UserWarning: from a", "py.warnings"),
        ("warning", "said 3 times", "timm.models"),
        ("error", "never retrieved", "asyncio"),
        ("info", "ours", None),
    ]
    assert "ZeroDivisionError" in lines[2]["exception"]
