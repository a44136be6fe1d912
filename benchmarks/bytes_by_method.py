"""Measures the bytes of a round for each PEFT method on ViT-B, beside the paper's 4 bytes a parameter.

One round, one client, dense float32 both ways, 100 classes. Payload and wire bytes are the daemon's own Prometheus
counters. The kernel's count is that of the loopback interface in a network namespace of its own, where nothing else
talks, from before the client starts until it is gone: registration, waiting, TCP and IP headers and acknowledgements
included. It cannot tell directions apart, so it is held against the sum of both. On a busy machine TCP may send a
segment twice because its acknowledgement is late; such a round is measured again, at most twice; the
count is shown.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from workload import daemon, ended_by_signals, scratch

MODEL, CLASSES = "vit_base_patch16_224", 100
METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "full": ("full", {}),
    "head": ("head", {}),
    "bias": ("bias", {}),
    "adapter": ("adapter", {}),
    "adapter, per block": ("adapter", {"shared": False}),
    "prompt": ("prompt", {}),
    "lora": ("lora", {}),
}
INSIDE = "FEDPEFT_BENCH_NAMESPACE"
ATTEMPTS = 3
GET_FLAGS, SET_FLAGS, UP = 0x8913, 0x8914, 0x1  # SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP


def bring_loopback_up() -> None:
    """Brings the loopback interface up, as `ip link set lo up` would, without needing `ip`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh", b"lo", 0).ljust(40, b"\0")
        (flags,) = struct.unpack_from("h", fcntl.ioctl(control, GET_FLAGS, request), 16)
        fcntl.ioctl(control, SET_FLAGS, struct.pack("16sh", b"lo", flags | UP).ljust(40, b"\0"))


def kernel_bytes() -> int:
    """Bytes that the loopback interface of this namespace has carried, each counted once."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, fields = line.partition(":")
        if name.strip() == "lo":
            return int(fields.split()[0])
    raise RuntimeError("this network namespace has no loopback interface")


def segments_resent() -> int:
    """TCP segments that this namespace has sent again."""
    names, values = (ln.split() for ln in Path("/proc/net/snmp").read_text().splitlines() if ln.startswith("Tcp:"))
    return int(values[names.index("RetransSegs")])


def measure(title: str) -> dict[str, Any]:
    """One method, again if TCP sent anything twice; the attempt with the fewest of these."""
    tried: list[dict[str, Any]] = []
    while not tried or (len(tried) < ATTEMPTS and tried[-1]["segments_resent"]):
        tried.append(attempt(title))
    return min(tried, key=lambda row: row["segments_resent"])


def attempt(title: str) -> dict[str, Any]:
    """One method; sizes in bytes. Needs a namespace of its own."""
    import round as one_round

    from fedpeft.config import ModelConfig
    from fedpeft.peft import spec_of

    name, options = METHODS[title]
    classes = tuple(f"c{i}" for i in range(CLASSES))
    spec = spec_of(ModelConfig(name=MODEL, weights="none", classes=classes), name, options)
    with scratch() as folder, daemon(folder) as server:
        run = one_round.create(server, spec, clients=1, rounds=1)
        before = server.counters(run)
        kernel, resent = kernel_bytes(), segments_resent()
        one_round.push_all(server, run, spec, 1, folder)
        kernel, resent = kernel_bytes() - kernel, segments_resent() - resent
        moved = {key: int(value - before[key]) for key, value in server.counters(run).items()}
    wire = moved["wire_up"] + moved["wire_down"]
    computed = 4 * spec.parameters
    return {
        "method": title,
        "parameters": spec.parameters,
        "computed_one_way": computed,
        **moved,
        "kernel_both_ways": kernel,
        "kernel_over_wire": kernel / wire,
        "segments_resent": resent,
        "payload_over_computed": (moved["payload_up"] + moved["payload_down"]) / (2 * computed),
    }


def measure_all() -> list[dict[str, Any]]:
    """All methods, in a process in a network namespace of its own."""
    command = [sys.executable, __file__, "--json"]
    entry = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        raise RuntimeError("`unshare` was not found; it is in the package util-linux")
    environment = {**os.environ, INSIDE: "1"}
    with (
        ended_by_signals(),
        subprocess.Popen([*entry, *command], env=environment, stdout=subprocess.PIPE, text=True) as inner,
    ):
        try:
            printed, _ = inner.communicate()
        finally:
            inner.terminate()  # it ends its daemon
    if inner.returncode:
        raise RuntimeError("the bytes could not be measured in a network namespace of their own; see above")
    found: list[dict[str, Any]] = json.loads(printed)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    print(f"\n{MODEL}, {CLASSES} classes, one round of one client, bytes")
    heads = (
        "4 B x params",
        "payload up",
        "payload down",
        "wire up",
        "wire down",
        "kernel, both",
        "kernel/wire",
        "resent",
    )
    print(f"{'method':20}{'parameters':>12}" + "".join(f"{h:>14}" for h in heads))
    for row in rows:
        keys = ("computed_one_way", "payload_up", "payload_down", "wire_up", "wire_down", "kernel_both_ways")
        cells = "".join(f"{row[k]:>14,}" for k in keys)
        print(
            f"{row['method']:20}{row['parameters']:>12,}{cells}{row['kernel_over_wire']:>14.4f}{row['segments_resent']:>14}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    chosen = parser.parse_args()
    if os.environ.get(INSIDE):
        bring_loopback_up()
        rows = [measure(title) for title in METHODS]
    else:
        rows = measure_all()
    if chosen.json:
        print(json.dumps(rows, indent=2))
    else:
        show(rows)


if __name__ == "__main__":
    main()
