"""A federation as an operator sets one up: certificates, tokens, enrolment, and a run over TLS, seen from the wire.

What a listener on the way reads, and what the collector of traces is told, is looked at in the same run.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from safetensors.numpy import load_file

from fedpeft.process import tracing

from ..ports import free_port
from .conftest import RUN_FILE, WAIT_S, Federation, Process, pump, wait_for, write_site

SMALL = RUN_FILE.replace("depth = 8", "depth = 1").replace('"full"', '"head"').replace("steps = 20", "steps = 2")


class Listener:
    """A TCP proxy on the way to the daemon that writes down all that passes."""

    def __init__(self, target: int) -> None:
        self.heard = bytearray()
        self._target = target
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._socket.close()

    def _accept(self) -> None:
        while self._socket.fileno() >= 0:
            try:
                near, _ = self._socket.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                return
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=pump, args=(source, sink, self.heard.extend), daemon=True).start()


class Collector(otlp_grpc.TraceServiceServicer):
    """An OTLP receiver."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, trace_pb2.Span]] = []
        self._server = grpc.server(ThreadPoolExecutor(2))
        otlp_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request: otlp.ExportTraceServiceRequest, context: object) -> otlp.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            said = {a.key: a.value.string_value for a in resource.resource.attributes}
            who = said["service.instance.id"] if said["service.name"] == "fedpeft-client" else "server"
            self.spans += [(who, span) for scope in resource.scope_spans for span in scope.spans]
        return otlp.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(None)


class Secured(Federation):
    """The same over TLS; clients reach the daemon through a listener."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.run_file.write_text(SMALL)
        self.collector = Collector()
        self.enrollment = free_port()
        self.listener = Listener(self.port)

    def init(self) -> None:
        person = ["--operator", "ada", "--operator-identity", str(self.folder / "ada")]
        command("fedpeft_server", "init", "--data-dir", str(self.folder / "server"), "--port", str(self.port), *person)

    def server(self) -> Process:
        where = ["--listen", f"127.0.0.1:{self.port}", "--enroll", f"127.0.0.1:{self.enrollment}", "--metrics", ""]
        told = ["--advertise", f"localhost:{self.listener.port}"]
        told += ["--advertise-enroll", f"localhost:{self.enrollment}", "--traces", self.collector.endpoint]
        process = self._start("fedpeft_server", "server", "--data-dir", str(self.folder / "server"), *where, *told)
        wait_for(lambda: process.events("serving") or process.process.poll() is not None, "the daemon")
        assert process.process.poll() is None, process.log.read_text()
        return process

    def token(self, name: str, role: str = "client") -> str:
        return command(
            "fedpeft_operator.app", *self._as_ada(), "token", "create", "--name", name, "--role", role
        ).strip()

    def enroll(self, name: str, role: str = "client") -> None:
        state = ["--state-dir", str(self.folder / name / "state")]
        command("fedpeft_client", "enroll", "-", *state, given=self.token(name, role))

    def client(self, name: str, *flags: str) -> Process:
        what = ["--data", str(self.folder / name / "data.parquet"), "--state-dir", str(self.folder / name / "state")]
        told = ["--threads", "1", "--traces", self.collector.endpoint]
        process = self._start("fedpeft_client", name, *what, *told, *flags)
        self.clients.append(process)
        return process

    def fedpeft(self, *arguments: str) -> Any:
        text = command("fedpeft_operator.app", *self._as_ada(), *arguments, "--json")
        return json.loads(text) if text.strip() else None

    def close(self) -> None:
        super().close()
        self.listener.close()
        self.collector.close()

    def _as_ada(self) -> list[str]:
        return ["--identity", str(self.folder / "ada")]


def command(module: str, *arguments: str, given: str = "") -> str:
    """Runs a command to its end and returns what it prints."""
    line = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(line, input=given, capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A federation over TLS whose run is over."""
    made = Secured(tmp_path_factory.mktemp("secured"))
    try:
        made.init()
        made.server()
        for name in ("alice", "bob"):
            made.enroll(name)
            made.client(name, "--once")
        made.run = made.create()  # type: ignore[attr-defined]
        made.tensors = made.finish(made.run)  # type: ignore[attr-defined]
        yield made
    finally:
        made.close()


pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded"), pytest.mark.xdist_group("over_tls")]


def test_every_byte_between_client_and_server_is_unreadable(secured: Any) -> None:
    shown = secured.show(secured.run)
    up = sum(r["payload_bytes_up"] for r in shown["rounds"])
    assert len(secured.listener.heard) > up > 0, "the listener was on the way"
    heard = bytes(secured.listener.heard)
    for tensor in load_file(secured.folder / "adapter.safetensors").values():
        assert tensor.tobytes()[:16] not in heard
    for word in (b"fedpeft.v1", b"head.weight", secured.run.encode(), b"alice"):
        assert word not in heard


def test_the_run_was_made_by_those_who_were_enrolled(secured: Any) -> None:
    people = {(i["role"], i["name"]) for i in secured.fedpeft("identity", "list")}
    assert people == {("operator", "ada"), ("client", "alice"), ("client", "bob")}
    out = secured.folder / "audit.jsonl"
    command("fedpeft_operator.app", *secured._as_ada(), "audit", "export", "--out", str(out))
    told = [(e["actor"], e["action"]) for e in map(json.loads, out.read_text().splitlines())]
    assert told.count(("client alice", "update.received")) == 2
    assert told.count(("server", "round.committed")) == 2
    assert ("operator ada", "run.created") in told
    command("fedpeft_operator.app", *secured._as_ada(), "audit", "verify")


@pytest.mark.parametrize("number", [1, 2])
def test_a_round_is_one_trace_over_all_processes(secured: Any, number: int) -> None:
    first = tracing.of_round(secured.run, number)
    whole = Counter({("server", "round"): 1, ("server", "open"): 1, ("server", "fold"): 1, ("server", "receive"): 2})
    whole.update((who, name) for who in ("alice", "bob") for name in ("pull", "train", "push"))

    def spans() -> list[tuple[str, trace_pb2.Span]]:
        trace_id = first.trace_id.to_bytes(16)
        return [(who, span) for who, span in secured.collector.spans if span.trace_id == trace_id]

    found = wait_for(lambda: len(spans()) >= whole.total() and spans(), "the spans of a round")
    assert Counter((who, span.name) for who, span in found) == whole
    (root,) = (span for _, span in found if span.name == "round")
    assert root.span_id == first.span_id.to_bytes(8) and not root.parent_span_id
    assert all(span.parent_span_id == root.span_id for _, span in found if span is not root)
    assert all(root.start_time_unix_nano <= span.start_time_unix_nano for _, span in found)
    assert {a.value.string_value for _, span in found for a in span.attributes if a.key == "fedpeft.run"} == {
        secured.run
    }


def test_a_client_that_is_started_again_is_let_in_again(secured: Any) -> None:
    secured.enroll("dave")
    write_site(secured.folder / "dave" / "data.parquet", 4)
    for _ in range(2):
        dave = secured.client("dave")
        assert wait_for(lambda dave=dave: dave.events("registered"), "dave")
        dave.kill()


def test_a_revoked_client_ends_and_says_why(secured: Any) -> None:
    secured.enroll("carol")
    write_site(secured.folder / "carol" / "data.parquet", 3)
    carol = secured.client("carol")
    wait_for(lambda: carol.events("registered"), "carol")
    command("fedpeft_operator.app", *secured._as_ada(), "client", "revoke", "carol", "--reason", "laptop lost")
    assert carol.process.wait(WAIT_S) != 0
    assert "were revoked" in carol.log.read_text()
