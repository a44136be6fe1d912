"""The state of a running server as its operators see it: runs that are paused, disks that are full."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

from fedpeft.api import views
from fedpeft.api.operator_client import OperatorClient
from fedpeft.errors import FedpeftError
from fedpeft.formatting import counted
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft.rpc import grpc_core
from fedpeft_operator.console.feeds.disks import disk_facts
from fedpeft_operator.doctor.findings import Finding, Setup, fault, ok, warning
from fedpeft_operator.doctor.network import ANSWER_S, called

NAMED = 5
"""Most paused runs that are named."""


def check_server_state(setup: Setup) -> Iterator[Finding]:
    """Asks the server for its runs and disks, where this identity may; nothing is renewed for it."""
    found = called(setup)
    if found is None:
        return
    server, identity = found
    if identity and identity.subject.role not in (Role.OPERATOR, Role.VIEWER):
        return
    grpc_core.configure()
    yield from asyncio.run(_asked(server, identity))


async def _asked(server: str, identity: Identity | None) -> list[Finding]:
    try:
        async with asyncio.timeout(ANSWER_S), aclosing(OperatorClient(server, identity, attempts=1)) as client:
            rows, storage = list(map(views.run_row, await client.runs())), await client.storage()
    except (TimeoutError, FedpeftError):
        return []  # said where the network is looked at
    findings = []
    for disk in disk_facts(storage):
        said = f"{disk.place} of the server: {disk.free} free of {disk.size}"
        if disk.is_full:
            spared = f"{said}, less than the {disk.spared} that it spares: uploads and new runs are refused"
            findings.append(fault("server disk", spared, "free some space, or take a larger disk"))
        else:
            findings.append(ok("server disk", said))
    paused = [row for row in rows if row["state"] == "paused"]
    for row in paused[:NAMED]:
        said = f"{row['run']} ({row['name']}) is paused: {row['reason'] or 'no reason was given'}"
        findings.append(warning("runs", said, f"fedpeft run resume {row['run']}, once that is mended"))
    if paused[NAMED:]:
        more = counted(len(paused) - NAMED, "more run is", "more runs are")
        findings.append(warning("runs", f"{more} paused", "fedpeft run list"))
    if not paused:
        findings.append(ok("runs", f"{counted(len(rows), 'run')}, none is paused"))
    return findings
