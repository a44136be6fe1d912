"""The compose file, really run with podman: images built, services started in their order, and taken down again.

podman-compose starts containers; this looks after what podman before 4.6 leaves out: it asks the health checks, and
waits for the conditions of `depends_on` as the file states them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ..ports import free_port
from .conftest import ROOT

PROJECT = "fedpeft-test"
TAG = "test"
STANDINS = ROOT / "tests" / "deploy" / "compose"
COMPOSE = ROOT / "deploy" / "docker-compose.yml"
SEVERAL = ROOT / "deploy" / "several.env"
LEFT_OUT = ("grafana", "client-gpu")
"""Parts that this machine cannot have: Grafana's image from a registry, and a GPU in a container."""
BUILD = ["--network", "host", "--isolation", "chroot", "--format", "docker"]
BASE = "docker.io/library/python:3.11-slim-bookworm"
WAIT_S = 240.0
"""Longest wait for one service to be well, or done; the run has its own."""


class Stack:
    """A project of podman-compose.

    Args:
        log: File that everything podman says goes to.
        variables: An --env-file of the composition; COMPOSE_PROFILES in it adds the services of these profiles.

    Attributes:
        services: The services that are run, as the compose file states them, by name.
        prometheus: URL of Prometheus, outside the containers.
    """

    def __init__(self, log: Path, variables: Path | None = None) -> None:
        self._log = log.open("ab")
        self._files = ["-f", str(COMPOSE), "-f", str(STANDINS / "standins.yml")]
        profiles: set[str] = set()
        if variables is not None:
            self._files += ["--env-file", str(variables)]
            lines = dict(re.findall(r"^(\w+)=(.*)$", variables.read_text(), flags=re.MULTILINE))
            profiles.update(lines["COMPOSE_PROFILES"].split(","))
        self.services: dict[str, Any] = {
            name: service
            for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items()
            if name not in LEFT_OUT and set(service.get("profiles", profiles)) <= profiles
        }
        self._environment = {**os.environ, "FEDPEFT_TAG": TAG}
        for name in ("CONSOLE", "PROMETHEUS", "GRAFANA"):
            self._environment[f"FEDPEFT_{name}_PORT"] = str(free_port())
        self.prometheus = f"http://127.0.0.1:{self._environment['FEDPEFT_PROMETHEUS_PORT']}"

    def close(self) -> None:
        """Removes this project's containers, volumes and networks, and nobody else's; its images stay, as a cache."""
        self.down()
        for volume in self._names("volume", "ls", "--format", "{{.Name}}"):
            self._say("volume", "rm", "-f", volume)
        for network in self._names("network", "ls", "--format", "{{.Name}}"):
            self._say("network", "rm", "-f", network)

    def down(self) -> None:
        """Removes this project's containers."""
        for name in self._names("ps", "-a", "--format", "{{.Names}}"):
            self._say("rm", "-f", "-t", "60", "--depend", name, check=False)

    def end(self) -> None:
        """Closes the log."""
        self._log.close()

    def build(self) -> None:
        """Builds the product's images and the stand-ins."""
        targets = {service["build"]["target"] for service in self.services.values() if "build" in service}
        for target in sorted(targets):
            self.build_image(target, TAG, ROOT)
        for target in sorted({"postgres", "prometheus", "minio"} & set(self.services)):
            tag = f"localhost/fedpeft-standin-{target}:latest"
            self._say("build", *BUILD, "--target", target, "-t", tag, str(STANDINS))

    def build_image(self, target: str, tag: str, checkout: Path) -> list[str]:
        """Builds one of the product's images; returns its layers, the lowest first."""
        image = f"localhost/fedpeft-{target}:{tag}"
        file = checkout / "deploy" / "Dockerfile"
        self._say("build", *BUILD, "-f", str(file), "--target", target, "-t", image, str(checkout))
        command = ["podman", "image", "inspect", "--format", "{{json .RootFS.Layers}}", image]
        layers = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        return [str(layer) for layer in json.loads(layers)]

    def up(self) -> None:
        """Starts every service, each when what it depends on has come to the state that it asks for."""
        waiting = {name: dict(service.get("depends_on", {})) for name, service in self.services.items()}
        while waiting:
            ready = [name for name, needs in waiting.items() if not set(needs) & set(waiting)]
            assert ready, f"the services {sorted(waiting)} wait for one another"
            for needed, condition in {pair for name in ready for pair in self._conditions(waiting[name])}:
                self.healthy(needed) if condition == "service_healthy" else self.done(needed)
            command = ["podman-compose", "-p", PROJECT, *self._files, "up", "-d", "--no-build", "--no-deps", *ready]
            subprocess.run(
                command, env=self._environment, check=True, stdout=self._log, stderr=self._log, timeout=WAIT_S
            )
            for name in ready:
                del waiting[name]

    def healthy(self, service: str, wait_s: float = WAIT_S) -> None:
        """Waits until a service's health check passes."""
        until = time.monotonic() + wait_s
        while self._say("healthcheck", "run", container(service), check=False):
            assert time.monotonic() < until, f"{service} is not well:\n{self.logs(service)[-3000:]}"
            time.sleep(1)

    def done(self, service: str, wait_s: float = WAIT_S) -> None:
        """Waits until a service that runs once has ended well; one that failed has been started again."""
        until = time.monotonic() + wait_s
        while (state := self.inspect(service)["State"])["Status"] != "exited" or state["ExitCode"]:
            assert time.monotonic() < until, f"{service} did not end well:\n{self.logs(service)[-3000:]}"
            time.sleep(1)

    def execute(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a service's container, as its user."""
        return subprocess.run(
            ["podman", "exec", container(service), *command], capture_output=True, text=True, timeout=WAIT_S
        )

    def fedpeft(self, *arguments: str) -> Any:
        """Runs the operator's command in the console's container; returns what it printed as JSON."""
        done = self.execute("console", "fedpeft", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return (
            [json.loads(line) for line in done.stdout.splitlines()]
            if arguments[0] == "audit"
            else json.loads(done.stdout)
        )

    def kill(self, service: str) -> None:
        """Kills a service's container with SIGKILL; nobody starts it again."""
        self._say("kill", container(service))

    def start(self, service: str) -> None:
        """Starts a service's container that was killed."""
        self._say("start", container(service))

    def inspect(self, service: str) -> Any:
        """Returns what podman knows of a service's container."""
        done = subprocess.run(["podman", "inspect", container(service)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0]

    def address(self, service: str, network: str) -> str:
        """Returns a service's address on a network."""
        return str(self.inspect(service)["NetworkSettings"]["Networks"][f"{PROJECT}_{network}"]["IPAddress"])

    def logs(self, service: str) -> str:
        """Returns what a service has said."""
        command = ["podman", "logs", container(service)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60).stdout

    def running(self) -> Iterator[str]:
        """Yields the services that stay."""
        for name, service in self.services.items():
            if service["restart"] == "unless-stopped":
                yield name

    def _conditions(self, needs: dict[str, Any]) -> list[tuple[str, str]]:
        return [(name, stated["condition"]) for name, stated in needs.items()]

    def _names(self, *arguments: str) -> list[str]:
        listed = subprocess.run(["podman", *arguments], capture_output=True, text=True, timeout=60, check=True)
        return [name for name in listed.stdout.split() if re.match(rf"{PROJECT}_", name)]

    def _say(self, *arguments: str, check: bool = True) -> int:
        command = ["podman", *arguments]
        done = subprocess.run(command, env=self._environment, stdout=self._log, stderr=self._log, timeout=1800)
        assert done.returncode == 0 or not check, f"{' '.join(command)} failed; {self._log.name} says why"
        return done.returncode


def skip_where_none_can_run() -> None:
    """Skips the test on a machine without root, podman, podman-compose or the base image."""
    for program in ("podman", "podman-compose"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    if os.geteuid():
        pytest.skip("root is needed: networks of containers without it are another program's")
    if subprocess.run(["podman", "image", "exists", BASE], timeout=60).returncode:
        pytest.skip(f"{BASE} is not here: podman pull {BASE}")


def container(service: str) -> str:
    """Returns the name that podman-compose gives to a service's container."""
    return f"{PROJECT}_{service}_1"


def size(image: str) -> int:
    """Returns an image's size, uncompressed, in bytes."""
    command = ["podman", "image", "inspect", "--format", "{{.Size}}", image]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
