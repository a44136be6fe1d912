"""deploy/several.env really run: three daemons under one name on one PostgreSQL and one bucket; one of them is killed.

`make test-compose`. Needs and leaves out what test_compose_federation.py does. In the place of MinIO is moto's S3,
behind the command and the health check of the compose file (tests/deploy/compose/minio.py). It keeps everything in
memory and checks no signature: nothing here shows that MinIO takes the daemons' keys, or keeps objects over a restart.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from .conftest import ROOT
from .stack import SEVERAL, Stack, skip_where_none_can_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CLIENTS = ["client-1", "client-2", "client-3", "client-4"]
SERVERS = ["server", "server-2", "server-3"]
OF_CLIENTS = ("Register", "PullAdapter", "PushUpdate")
"""Calls that clients alone make."""
ROUNDS = 5
RUN_S = 1800.0
SCRAPED_S = 120.0

METRICS = """
import os, urllib.request
print(urllib.request.urlopen(f"http://{os.environ['FEDPEFT_SERVER_METRICS']}/metrics", timeout=10).read().decode())
"""

OBJECTS = """
import boto3, hashlib, json, os
from pathlib import Path
password = Path(os.environ["MINIO_ROOT_PASSWORD_FILE"]).read_text()
keys = {"aws_access_key_id": os.environ["MINIO_ROOT_USER"], "aws_secret_access_key": password}
s3 = boto3.client("s3", endpoint_url="http://127.0.0.1:9000", region_name="us-east-1", **keys)
found = [each["Key"] for each in s3.list_objects_v2(Bucket="fedpeft").get("Contents", [])]
bodies = {key: s3.get_object(Bucket="fedpeft", Key=key)["Body"].read() for key in found}
print(json.dumps({key: hashlib.sha256(body).hexdigest() for key, body in bodies.items()}))
"""


@dataclass(frozen=True)
class Course:
    """A run in the middle of which a daemon was killed, and ran again once the run had ended.

    Attributes:
        stack: The federation.
        run: Its run, as `fedpeft run show --json` prints it after the end.
        killed: The service that was killed.
        version: The run's version when it was killed.
        served: Calls of clients that each daemon has answered, by service and method: the killed one before its end.
    """

    stack: Stack
    run: Any
    killed: str
    version: int
    served: dict[str, Counter[str]]


@pytest.fixture(scope="module")
def course() -> Iterator[Course]:
    skip_where_none_can_run()
    folder = ROOT / "build" / "compose-several"
    folder.mkdir(parents=True, exist_ok=True)
    stack = Stack(folder / "podman.log", SEVERAL)
    try:
        stack.close()
        begun = time.monotonic()
        stack.build()
        built = time.monotonic()
        stack.up()
        for server in SERVERS:
            stack.healthy(server)
        up = time.monotonic()
        killed, version, before = kill_midway(stack)
        stack.done("run", RUN_S)
        ended = time.monotonic()
        served = {server: before if server == killed else of_clients(stack, server) for server in SERVERS}
        stack.start(killed)
        figures = {"seconds": {"build": built - begun, "up": up - built, "run": ended - up}, "served": served}
        (folder / "figures.json").write_text(json.dumps({**figures, "killed": killed, "version": version}) + "\n")
        (row,) = stack.fedpeft("run", "list")
        yield Course(stack, stack.fedpeft("run", "show", row["run"]), killed, version, served)
    finally:
        for service in (*SERVERS, *CLIENTS, "minio", "run"):
            (folder / f"{service}.log").write_text(stack.logs(service))
        if not os.environ.get("FEDPEFT_KEEP_STACK"):
            stack.close()
        stack.end()


def kill_midway(stack: Stack) -> tuple[str, int, Counter[str]]:
    """Kills the first daemon that has folded a round and taken an update, while the next round is open.

    Returns its service, the run's version and the calls that it has served.
    """
    until = time.monotonic() + RUN_S
    while True:
        for server in SERVERS:
            committed = rounds_committed(stack, server)
            if committed and (served := of_clients(stack, server))["PushUpdate"]:
                stack.kill(server)
                return server, max(committed), served
        assert time.monotonic() < until, stack.logs("run")[-2000:]
        time.sleep(0.5)


def rounds_committed(stack: Stack, server: str) -> list[int]:
    """Returns the rounds that a daemon has folded and committed, by its log."""
    # podman before 5 may print two lines as one.
    lines = re.findall(r'\{[^{}]*"event": "round committed"[^{}]*\}', stack.logs(server))
    return [json.loads(line)["round"] for line in lines]


def of_clients(stack: Stack, server: str) -> Counter[str]:
    """Returns how many calls of clients a daemon has answered well, by method."""
    done = stack.execute(server, "python", "-c", METRICS)
    assert done.returncode == 0, done.stderr
    served = Counter[str]()
    for labels, number in re.findall(r"^fedpeft_grpc_requests_total\{(.*)\} (\S+)$", done.stdout, re.MULTILINE):
        given = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if given["code"] == "OK" and given["method"].rpartition("/")[2] in OF_CLIENTS:
            served[given["method"].rpartition("/")[2]] += int(float(number))
    return served


def test_each_daemon_served_clients(course: Course) -> None:
    for server, calls in course.served.items():
        assert calls.total(), f"no client came to {server}: {course.served}"


def test_the_run_was_completed_though_a_daemon_that_folded_was_killed(course: Course) -> None:
    assert 0 < course.version < ROUNDS
    assert course.run["state"] == "completed"
    assert [row["version"] for row in course.run["rounds"]] == list(range(1, ROUNDS + 1))
    for row in course.run["rounds"]:
        assert sorted(row["clients"]) == CLIENTS
    by_others = [n for s in SERVERS if s != course.killed for n in rounds_committed(course.stack, s)]
    assert ROUNDS in by_others, "others have folded the rest"


def test_each_receipt_counts_once_and_each_round_was_committed_once(course: Course) -> None:
    entries = [entry for entry in course.stack.fedpeft("audit", "show") if entry["object"] == course.run["run"]]
    details = {
        action: [json.loads(entry["details"]) for entry in entries if entry["action"] == action]
        for action in ("update.received", "round.committed")
    }
    received = Counter((each["client"], each["round"]) for each in details["update.received"])
    assert received == Counter((client, n) for client in CLIENTS for n in range(1, ROUNDS + 1))
    counted = [(each["round"], each["updates"]) for each in details["round.committed"]]
    assert counted == [(n, len(CLIENTS)) for n in range(1, ROUNDS + 1)]
    receipts = {each["ticket"] for each in details["update.received"]}
    assert {ticket["ticket"] for row in course.run["rounds"] for ticket in row["tickets"]} == receipts
    for row in course.run["rounds"]:
        assert row["wire_bytes_up"] > row["payload_bytes_up"] > 0


def test_records_and_audit_log_are_verified(course: Course) -> None:
    for what in (["run", "verify", course.run["run"]], ["audit", "verify"]):
        done = course.stack.execute("console", "fedpeft", *what)
        assert done.returncode == 0, done.stderr


def test_the_versions_lie_in_the_bucket_and_the_updates_lay_there(course: Course) -> None:
    run = course.run["run"]
    done = course.stack.execute("minio", "/opt/moto/bin/python", "-c", OBJECTS)
    assert done.returncode == 0, done.stderr
    objects = json.loads(done.stdout)
    records = course.stack.fedpeft("run", "verify", run)["rounds"]
    place = f"blobs/runs/{run}/versions/"
    stored = sorted((key[len(place) :][:6], sha256) for key, sha256 in objects.items() if key.startswith(place))
    assert stored[1:] == [(f"{record['round']:06}", record["adapter_sha256"]) for record in records]
    for server in SERVERS:
        assert course.stack.execute(server, "test", "-e", "/var/lib/fedpeft/blobs").returncode == 1, server
    written = re.findall(r'"PUT (/fedpeft/updates/\S+) HTTP/1.1" 200', course.stack.logs("minio"))
    tickets = [ticket["ticket"] for row in course.run["rounds"] for ticket in row["tickets"]]
    assert all(any(ticket in path for path in written) for ticket in tickets), written


def test_the_killed_daemon_comes_back_and_prometheus_scrapes_all_three(course: Course) -> None:
    for service in course.stack.running():
        course.stack.healthy(service, 60)
    query = urllib.parse.urlencode({"query": 'up{job="fedpeft"} == 1'})
    until = time.monotonic() + SCRAPED_S  # it scrapes every so many seconds
    while True:
        with urllib.request.urlopen(f"{course.stack.prometheus}/api/v1/query?{query}", timeout=10) as answer:
            result = json.load(answer)["data"]["result"]
        if {sample["metric"]["instance"] for sample in result} == {f"{server}:9464" for server in SERVERS}:
            return
        assert time.monotonic() < until, result
        time.sleep(1)
