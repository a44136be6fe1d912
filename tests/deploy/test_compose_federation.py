"""deploy/docker-compose.yml really run: a federation over mTLS between containers, to its end, and what contains them.

`make test-compose`. Needs root, podman, podman-compose, some 20 GB of disk and a quarter of an hour. Left out for want
of its image: Grafana. PostgreSQL and Prometheus are Debian's (tests/deploy/compose/Dockerfile).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT
from .stack import BASE, TAG, Stack, size, skip_where_none_can_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CLIENTS = ["client-1", "client-2", "client-3", "client-4"]
ROUNDS = 5
RUN_S = 1800.0
SCORED_S = 300.0
SCRAPED_S = 120.0
MIB = 1024**2
SERVER_MIB = 320
"""Most that server and its needs may add to the image of Python, uncompressed."""

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=4).close()
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """The federation, once its run has ended."""
    skip_where_none_can_run()
    folder = ROOT / "build" / "compose"
    folder.mkdir(parents=True, exist_ok=True)
    made = Stack(folder / "podman.log")
    try:
        made.close()
        begun = time.monotonic()
        made.build()
        built = time.monotonic()
        made.up()
        up = time.monotonic()
        made.done("run", RUN_S)
        seconds = {"build": built - begun, "up": up - built, "run": time.monotonic() - up}
        sizes = {name: size(f"localhost/fedpeft-{name}:{TAG}") / MIB for name in ("server", "operator", "client")}
        sizes["base"] = size(BASE) / MIB
        (folder / "figures.json").write_text(json.dumps({"seconds": seconds, "image_mib": sizes}, indent=2) + "\n")
        yield made
        for service in made.services:
            if service in (*CLIENTS, "server", "run", "evaluator"):
                (folder / f"{service}.log").write_text(made.logs(service))
    finally:
        if not os.environ.get("FEDPEFT_KEEP_STACK"):
            made.close()
        made.end()


@pytest.fixture(scope="module")
def run(stack: Stack) -> Any:
    """The run once all its versions are scored: the newest is scored first, and its watcher waits for no other."""
    (row,) = stack.fedpeft("run", "list")
    until = time.monotonic() + SCORED_S
    while True:
        shown = stack.fedpeft("run", "show", row["run"])
        if all("accuracy" in each["metrics"] for each in shown["rounds"]):
            return shown
        assert time.monotonic() < until, stack.logs("evaluator")[-2000:]
        time.sleep(1)


def test_the_run_was_completed_and_every_client_took_part_in_every_round(run: Any) -> None:
    assert run["state"] == "completed"
    assert [row["version"] for row in run["rounds"]] == list(range(1, ROUNDS + 1))
    for row in run["rounds"]:
        names = [client if isinstance(client, str) else client["client"] for client in row["clients"]]
        assert sorted(names) == CLIENTS
        assert row["wire_bytes_up"] > row["payload_bytes_up"] > 0


def test_the_model_has_learnt(run: Any) -> None:
    accuracies = [row["metrics"]["accuracy"] for row in run["rounds"] if "accuracy" in row["metrics"]]
    assert accuracies[-1] > 1 / 9 + 0.05, "nine classes: chance is 1 / 9"


def test_everybody_was_enrolled_and_spoke_mtls(stack: Stack) -> None:
    assert '"security": "TLS 1.3"' in stack.logs("server")
    identities = {(row["role"], row["name"]): row for row in stack.fedpeft("identity", "list")}
    for who in [("client", name) for name in CLIENTS] + [("evaluator", "evaluator")]:
        assert identities[who]["fingerprint"] and not identities[who]["revoked_at"]


def test_the_audit_log_says_who_came_how_and_is_whole(stack: Stack) -> None:
    log = stack.execute("console", "fedpeft", "audit", "show")
    assert log.returncode == 0, log.stderr
    for name in CLIENTS:
        assert any("enroll" in line and name in line for line in log.stdout.splitlines()), log.stdout
    verified = stack.execute("console", "fedpeft", "audit", "verify")
    assert verified.returncode == 0 and "each follows the one before it" in verified.stdout


def test_the_record_of_every_round_is_verified(stack: Stack, run: Any) -> None:
    done = stack.execute("console", "fedpeft", "run", "verify", run["run"])
    assert done.returncode == 0, done.stderr


def test_prometheus_has_scraped_the_bytes(stack: Stack, run: Any) -> None:
    query = urllib.parse.urlencode({"query": 'sum by (direction) (fedpeft_wire_bytes_total{job="fedpeft"})'})
    until = time.monotonic() + SCRAPED_S  # it scrapes every so many seconds
    while True:
        with urllib.request.urlopen(f"{stack.prometheus}/api/v1/query?{query}", timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
        scraped = {sample["metric"]["direction"]: float(sample["value"][1]) for sample in result}
        if scraped.get("up", 0.0) >= sum(row["wire_bytes_up"] for row in run["rounds"]):
            return
        assert time.monotonic() < until, scraped
        time.sleep(1)


def test_a_client_reaches_the_server_and_nobody_else(stack: Stack) -> None:
    def fault(host: str, port: int) -> str:
        done = stack.execute("client-1", "python", "-c", CONNECT, host, str(port))
        return done.stderr.strip() if done.returncode else ""

    assert fault("server", 7070) == ""
    assert fault(stack.address("server", "site-1"), 9464).startswith("ConnectionRefusedError"), "metrics are elsewhere"
    others = {
        "the metrics": (stack.address("server", "metrics"), 9464),
        "postgres": (stack.address("postgres", "storage"), 5432),
        "another client": (stack.address("client-2", "site-2"), 9465),
        "prometheus": (stack.address("prometheus", "desk"), 9090),
        "the internet": ("192.0.2.1", 443),
    }
    faults = {who: fault(*where) for who, where in others.items()}
    assert all(re.match("TimeoutError|OSError: .*unreachable", said) for said in faults.values()), faults
    names = {name: fault(name, 9465) for name in ("postgres", "client-2", "prometheus", "evaluator")}
    assert all(said.startswith("gaierror") for said in names.values()), names


def test_a_client_has_no_way_out(stack: Stack) -> None:
    for name in (*CLIENTS, "evaluator"):
        routes = [line.split() for line in stack.execute(name, "cat", "/proc/net/route").stdout.splitlines()[1:]]
        assert routes and all(destination != "00000000" for _, destination, *_ in routes), "there is a default route"


def test_nobody_is_root_has_a_capability_or_writes_on_its_file_system(stack: Stack) -> None:
    for service in stack.running():
        status = dict(
            line.split(":\t", 1) for line in stack.execute(service, "cat", "/proc/1/status").stdout.splitlines()
        )
        assert "0" not in status["Uid"].split(), service
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, service
        assert status["NoNewPrivs"] == "1", service
        for place in ("/", "/opt", "/usr/bin", "/etc"):
            assert stack.execute(service, "touch", f"{place}/written").returncode, f"{service} wrote in {place}"


def test_the_console_s_log_has_a_link_that_can_be_opened_outside(stack: Stack) -> None:
    said = re.search(r"http://localhost:8080(/login\?key=\S+)", stack.logs("console"))
    assert said is not None
    (published,) = stack.inspect("console")["NetworkSettings"]["Ports"]["8080/tcp"]
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    with browser.open(f"http://localhost:{published['HostPort']}{said[1]}", timeout=10) as answer:
        assert "FedPEFT console" in answer.read().decode()


def test_every_health_check_passes(stack: Stack) -> None:
    well = set()
    for service in stack.running():
        stack.healthy(service, 60)
        well.add(service)
    assert well >= {"server", "console", "evaluator", *CLIENTS}


def test_no_secret_is_in_what_podman_knows(stack: Stack) -> None:
    password = stack.execute("server", "cat", "/var/lib/fedpeft/pgpass").stdout.strip().rpartition(":")[2]
    token = stack.execute("client-1", "cat", "/site/token").stdout.strip()
    assert len(password) > 20 and len(token) > 20
    for service in stack.services:
        known = json.dumps(stack.inspect(service))
        assert password not in known and token not in known, service


def test_a_client_sees_its_own_token_and_data_only(stack: Stack) -> None:
    tokens = {name: stack.execute(name, "cat", "/site/token").stdout for name in CLIENTS}
    assert len(set(tokens.values())) == len(CLIENTS)
    for name in CLIENTS:
        mounted = {mount["Destination"] for mount in stack.inspect(name)["Mounts"]}
        assert mounted == {"/site", "/backbone", "/var/lib/fedpeft"}
        assert stack.execute(name, "touch", "/site/written").returncode


def test_the_server_is_small_and_has_no_torch(stack: Stack) -> None:
    done = stack.execute("server", "python", "-c", "import torch")
    assert "No module named 'torch'" in done.stderr
    assert (size(f"localhost/fedpeft-server:{TAG}") - size(BASE)) / MIB < SERVER_MIB


def test_a_pin_of_what_an_image_has_not_makes_none_of_its_layers_again(stack: Stack, tmp_path: Path) -> None:
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            (tmp_path / line[1:]).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copytree if (ROOT / line[1:]).is_dir() else shutil.copy
            copy(ROOT / line[1:], tmp_path / line[1:])
    for name in (".dockerignore", "deploy/Dockerfile"):
        shutil.copy(ROOT / name, tmp_path / name)
    pins = tmp_path / "constraints.txt"
    other, changed = re.subn("^mkdocs==.*$", "mkdocs==9.9.9", pins.read_text(), flags=re.MULTILINE)
    assert changed == 1
    before = {target: stack.build_image(target, TAG, tmp_path) for target in ("server", "client")}
    pins.write_text(other)
    for target, layers in before.items():
        assert len(layers) > 3
        assert stack.build_image(target, "other-pin", tmp_path) == layers


def test_down_and_up_again_it_is_the_same_federation(stack: Stack, run: Any) -> None:
    identities = stack.fedpeft("identity", "list")
    stack.down()
    stack.up()
    stack.done("run")
    assert stack.fedpeft("identity", "list") == identities, "nobody had to enroll anew"
    now = stack.fedpeft("run", "show", run["run"])["rounds"]
    pairs = zip(run["rounds"], now, strict=True)
    assert [(a["version"], key, a[key], b[key]) for a, b in pairs for key in a if a[key] != b[key]] == []
    assert len(stack.fedpeft("run", "list")) == 1
    for name in CLIENTS:
        until = time.monotonic() + 120
        while '"event": "registered"' not in stack.logs(name):
            assert time.monotonic() < until, stack.logs(name)[-2000:]
            time.sleep(1)
