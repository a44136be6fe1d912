"""The agent's own transfers with a real daemon that asks them to go on later: other transfers wait, a disk is slow."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from fedpeft.adapters import payload
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.state.adapters import AdapterCache, CachedAdapter
from fedpeft_client.state.outbox import PAYLOAD, Outcome, Pending
from fedpeft_client.state.runs import KnownRun
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.pull import Puller
from fedpeft_client.uplink.push import Pusher
from fedpeft_client.uplink.retry import Retry
from fedpeft_server.rpc import interceptors
from fedpeft_server.store.spool_writer import SpoolWriter
from fedpeft_server.uploads import chunk_receiver, pipeline

from ..server.conftest import Daemon, RawClient, StartDaemon, config, filled, header, start, zeros
from .conftest import SlowLink

__all__ = ["start"]  # a fixture, used by name

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded")]

SPEC = AdapterSpec.of("bias", [TensorSpec("head.weight", (2_000_000,))])  # 8 MB: eight chunks


class Site:
    """The agent's transfers, under the name and instance of a raw client that gets the tickets."""

    def __init__(self, daemon: Daemon, raw: RawClient, folder: Path, spec: AdapterSpec) -> None:
        self.raw, self.folder = raw, folder / raw.name
        self.folder.mkdir()
        self._address = daemon.server.settings.listen
        self._who = (raw.name, dict(raw.metadata)["fedpeft-instance"])
        self._spec = spec
        self.log = structlog.get_logger(client=raw.name)
        self.timing = TIMING
        self.retry = Retry(self.log, 0.0)  # a server that is away even once ends the test

    def pending(self, run: str, ticket: str) -> Pending:
        manifest, data = payload.encode(filled(1.0, self._spec), self._spec.sent(1), "float32")
        (self.folder / PAYLOAD).write_bytes(data)
        return Pending(self.folder, run, 1, header(ticket, manifest), policy="")

    async def push(self, run: str, ticket: str, port: int = 0) -> Outcome:
        address = f"127.0.0.1:{port}" if port else self._address
        async with Channel(address, *self._who, timing=self.timing) as channel:
            pusher = Pusher(channel, self.retry, EgressLog(self.folder, address))
            return await pusher.push(self.pending(run, ticket), self.log)

    async def pull(self, run: KnownRun) -> CachedAdapter:
        async with Channel(self._address, *self._who, timing=self.timing) as channel:
            return await Puller(channel, self.retry, run, AdapterCache(self.folder)).pull(0)


async def sites(
    daemon: Daemon, folder: Path, count: int, spec: AdapterSpec = SPEC
) -> tuple[str, list[Site], list[str]]:
    run = await daemon.create(config(rounds={"count": 1, "clients": count}), spec, zeros(spec))
    raw = await daemon.clients(*"abcdef"[:count])
    tasks = await asyncio.gather(*(client.task() for client in raw))
    return run.id, [Site(daemon, client, folder, spec) for client in raw], [task.ticket for task in tasks]


@pytest.mark.timed(transfer_turn_s=0.0)  # a chunk each
async def test_agents_that_share_one_turn_all_come_to_their_receipts(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(max_transfers=1)
    run, everybody, tickets = await sites(daemon, tmp_path, 3)
    with capture_logs() as lines:
        pushes = [site.push(run, ticket) for site, ticket in zip(everybody, tickets, strict=True)]
        async with asyncio.timeout(60):
            assert await asyncio.gather(*pushes) == [Outcome.COUNTED] * 3
    reasons = [line["reason"] for line in lines if line["event"] == "retrying as the server asked"]
    assert reasons.count("TURN_OVER") >= 1
    offsets = [line["offset"] for line in lines if line["event"] == "uploading" and line["client"] == "a"]
    assert offsets == sorted(offsets)
    await daemon.until(run, lambda r: r.version == 1)
    assert all((x == 1.0).all() for x in (await daemon.adapter(run, 1)).values())


@pytest.mark.timed(transfer_turn_s=0.0)  # a chunk each
async def test_agents_that_share_one_turn_all_pull_the_version(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(max_transfers=1)
    run, everybody, _ = await sites(daemon, tmp_path, 3)
    known = KnownRun.of(await daemon.run(run))
    async with asyncio.timeout(60):
        held = await asyncio.gather(*(site.pull(known) for site in everybody))
    assert [h.payload.stat().st_size for h in held] == [8_000_000] * 3


async def test_transfers_on_a_line_too_slow_for_a_large_chunk_come_to_their_end(
    start: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk counts as progress only when it is whole; at 200 kB/s one of 600 kB takes three stall limits."""
    for module in (chunk_receiver, interceptors):
        monkeypatch.setattr(module, "STALL_S", 1.0)
    daemon = await start()
    small = AdapterSpec.of("bias", [TensorSpec("head.weight", (150_000,))])
    run, (site,), (ticket,) = await sites(daemon, tmp_path, 1, small)
    link = SlowLink(int(daemon.server.settings.listen.rpartition(":")[2]), 200_000)
    site.retry.give_up_s, site.timing = None, replace(TIMING, stall_s=1.0)
    try:
        async with asyncio.timeout(40):
            assert await site.push(run, ticket, link.port) is Outcome.COUNTED
    finally:
        link.close()


async def test_an_agent_waits_for_its_receipt_as_long_as_the_disk_takes(
    start: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "HOLD_S", 0.1)
    daemon = await start()
    run, (site,), (ticket,) = await sites(daemon, tmp_path, 1)
    go, finish, finishes = threading.Event(), SpoolWriter.finish, []

    def slow_finish(writer: SpoolWriter) -> Path:
        finishes.append(writer.ticket)
        assert go.wait(30)
        return finish(writer)

    monkeypatch.setattr(SpoolWriter, "finish", slow_finish)
    with capture_logs() as lines:
        pushing = asyncio.create_task(site.push(run, ticket))
        async with asyncio.timeout(30):
            while sum(line.get("reason") == "BEING_CHECKED" for line in lines) < 5:
                await asyncio.sleep(0.02)
            go.set()
            assert await pushing is Outcome.COUNTED
    assert finishes == [ticket]
    assert not [line for line in lines if line["log_level"] == "warning"]
