"""Two machines, as network namespaces: the tutorial's commands, each on its machine, with tshark on the wire."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from ..docs.walkthrough import blocks, steps
from .conftest import RUN_FILE, WAIT_S, wait_for, write_site
from .machines import Machines, laid

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "two-machines.md"

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    with laid(tmp_path, "tshark") as made:
        yield made


def test_the_tutorials_commands_hold_a_run_over_tls(machines: Machines, tmp_path: Path) -> None:
    write_site(tmp_path / "images" / "images.parquet", 1)
    text = RUN_FILE.replace("depth = 8", "depth = 1").replace('"full"', '"head"').replace("steps = 20", "steps = 2")
    (tmp_path / "run.toml").write_text(text.replace("clients = 2", "clients = 1").replace("quorum = 2", "quorum = 1"))
    wire = str(tmp_path / "wire.pcap")
    sniffer = machines.start(machines.head, "tshark.log", f"tshark -i wire -w {wire} -q")
    wait_for(lambda: Path(wire).exists(), "tshark")
    said = follow(machines)

    run = re.findall(r"run-[0-9a-z]{12}", said["fedpeft run create run.toml"])[0]
    shown = json.loads(machines.run(machines.head, f"fedpeft run show {run} --json"))
    assert (shown["state"], [r["clients"] for r in shown["rounds"]]) == ("completed", [["site-a"], ["site-a"]])
    assert "were revoked" in (tmp_path / "fedpeft-client.log").read_text(), "the page ends with a lost laptop"
    machines.run(machines.head, f"fedpeft run export {run} --format safetensors --out adapter.safetensors")
    time.sleep(1)  # the last packets reach tshark's file
    sniffer.terminate()
    sniffer.wait(WAIT_S)

    heard = Path(wire).read_bytes()
    assert len(heard) > sum(r["wire_bytes_up"] for r in shown["rounds"]), "tshark was on the way"
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert not [name for name, tensor in tensors.items() if tensor.tobytes()[:16] in heard]
    token = (tmp_path / "token.txt").read_bytes().strip()
    assert not [word for word in (b"fedpeft.v1", b"head.weight", b"site-a", token) if word in heard]
    assert set(fields(wire, "tls.handshake.type == 2", "tls.handshake.extensions.supported_version")) == {"0x0304"}
    bare = fields(wire, "tcp.len > 0 && !tls && !tcp.analysis.retransmission && !tcp.reassembled_in", "frame.number")
    assert not bare, "every segment with data is a part of a TLS record"


def follow(machines: Machines) -> dict[str, str]:
    """Runs every command of the tutorial on the machine it is for; returns what each that ends printed."""
    said: dict[str, str] = {}
    for block in blocks(PAGE.read_text()):
        if block.language != "console":
            continue
        machine = machines.head if block.title.startswith("server's machine") else machines.site
        for command, shown in steps(block.text):
            if not block.title.endswith("a terminal that stays"):
                said[command] = machines.run(machine, command)
                if "run create" in command:
                    wait_for(lambda: "completed" in machines.run(machines.head, "fedpeft run list"), "the run", 1.0)
                continue
            program = command.split()[0]
            machines.start(machine, f"{program}.log", f"{command} --log-format console")
            until_said(machines.folder / f"{program}.log", shown[-1].split()[2])  # [info ] WORD ...
    until_said(machines.folder / "fedpeft-client.log", "were revoked")
    return said


def until_said(log: Path, words: str) -> None:
    wait_for(lambda: f" {words}" in log.read_text(), f"{log.name} to say {words}")


def fields(capture: str, which: str, field: str) -> list[str]:
    """Returns a field of the packets that a display filter selects."""
    # Port 7071 is no protocol's; what speaks TLS there is found by its handshake.
    command = ["tshark", "-r", capture, "-Y", which, "-T", "fields", "-e", field]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return [line for line in text.splitlines() if line]
