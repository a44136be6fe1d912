from __future__ import annotations

import math

from structlog.testing import capture_logs

from fedpeft.process import logs
from fedpeft_client.worker.trainer import sendable


def test_figures_that_are_left_out_are_logged_once_with_the_reason() -> None:
    with capture_logs() as lines:
        assert sendable({"loss": math.inf, "accuracy": 0.5, "steps": -1.0}, 64, logs.logger()) == {"accuracy": 0.5}
        assert sendable({"accuracy": 0.5}, 64, logs.logger()) == {"accuracy": 0.5}
    (line,) = lines
    assert (line["log_level"], line["dropped"]) == ("warning", 2)
    assert (
        line["cause"]
        == "the figure loss is inf; it must be finite; the figure steps is -1; 0 to 4,294,967,296 is taken"
    )
