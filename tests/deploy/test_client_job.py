"""A site's own Prometheus scrapes its clients, with the project's configuration."""

from __future__ import annotations

import time
from pathlib import Path

from fedpeft_client.owner.metrics import Metrics, State

from ..ports import free_port
from .prometheus import scraping

WAIT_S = 20


def test_a_client_named_in_the_targets_is_scraped_as_a_job_of_its_own(tmp_path: Path) -> None:
    metrics, address = Metrics(), f"127.0.0.1:{free_port()}"
    metrics.enter(State.TRAINING)
    with metrics.served(address), scraping(address, tmp_path / "prometheus", "clients") as prometheus:
        asked = f'fedpeft_client_state{{job="fedpeft-client", instance="{address}", state="training"}} == 1'
        until = time.monotonic() + WAIT_S
        while not (found := prometheus.series(asked)) and time.monotonic() < until:
            time.sleep(0.1)
        assert found == 1
        assert prometheus.series('fedpeft_client_state{job="fedpeft-client"}') == len(State)
