"""A real Prometheus with the project's configuration and rules, in a hurry."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..ports import free_port
from .conftest import PROMETHEUS, program

HURRY = "250ms"
"""Interval of scraping and evaluation, in place of 15 s."""


class Prometheus:
    """A running Prometheus; its answers are those of its HTTP interface."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str, **parameters: str) -> Any:
        url = f"{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def series(self, expr: str) -> int:
        """Returns how many series a query has now that are numbers.

        Raises:
            AssertionError: If it is no query.
        """
        try:
            result = self.get("query", query=expr)["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from error
        return sum(not math.isnan(float(sample["value"][1])) for sample in result)

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/-/ready", timeout=1) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@contextmanager
def scraping(target: str, folder: Path, targets: str = "fedpeft") -> Iterator[Prometheus]:
    """Runs Prometheus on a daemon's metrics, or a client's: the project's configuration, but for pace and target."""
    binary = program("prometheus")
    shutil.copytree(PROMETHEUS, folder, dirs_exist_ok=True)
    (folder / "targets" / f"{targets}.yml").write_text(yaml.safe_dump([{"targets": [target]}]))
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": HURRY, "scrape_timeout": HURRY, "evaluation_interval": HURRY}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    flags = {"config.file": folder / "prometheus.yml", "storage.tsdb.path": folder / "tsdb", "log.level": "warn"}
    flags["web.listen-address"] = f"127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        command = [binary, *(f"--{name}={value}" for name, value in flags.items())]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        there = Prometheus(port)
        until = time.monotonic() + 30
        while not there.ready():
            assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.05)
        yield there
    finally:
        process.kill()
        process.wait()
