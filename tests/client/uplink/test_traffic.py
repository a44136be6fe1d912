"""The owner's ledger never tells less than the server got, however often a call is repeated."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fedpeft.process import logs
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft_client.egress import message_entries
from fedpeft_client.egress.entries import EgressEntry, read
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state.state_dir import StateDirectory
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink import retry as retry
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry
from fedpeft_client.uplink.traffic import Traffic

from ..federation import Federation

REGISTRATION = pb.RegisterRequest(capabilities=pb.Capabilities(software="x" * 100))


@dataclass
class Site:
    """A client's calls, counted and booked as the agent's are."""

    channel: Channel
    egress_log: EgressLog
    retry: Retry

    async def send(self, entry: EgressEntry, call: Callable[[], Awaitable[object]]) -> None:
        with self.egress_log.record(entry):
            await self.retry.call(call)

    @property
    def booked_bytes(self) -> int:
        return sum(each.entry.wire_bytes for each in read(self.egress_log.path).booked.values())


@pytest.fixture
async def site(federation: Federation, tmp_path: Path) -> AsyncIterator[Site]:
    timing = replace(TIMING, first_pause_s=0.01, longest_pause_s=0.01)
    with StateDirectory(tmp_path / "state") as directory, EgressLog(directory.path, federation.address) as egress_log:
        async with Channel(federation.address, "site-a", directory.instance) as channel:
            Traffic(channel, egress_log, Metrics())
            yield Site(channel, egress_log, Retry(logs.logger(client="site-a"), None, timing))


async def test_a_call_that_is_repeated_is_booked_each_time(federation: Federation, site: Site) -> None:
    federation.unavailable = 9
    await site.send(message_entries.registration(REGISTRATION), lambda: site.channel.register(REGISTRATION))
    assert federation.arrivals.messages["RegisterRequest"] == 10
    assert site.booked_bytes == 10 * REGISTRATION.ByteSize() == federation.arrivals.wire_bytes


async def test_a_repetition_is_in_the_file_before_it_leaves(federation: Federation, site: Site) -> None:
    federation.unavailable = 9
    seen: list[bool] = []

    async def register() -> None:
        await site.channel.register(REGISTRATION)

    async def attempt() -> None:
        try:
            await register()
        finally:
            seen.append(site.booked_bytes >= federation.arrivals.wire_bytes)

    await site.send(message_entries.registration(REGISTRATION), attempt)
    assert seen == [True] * 10, "a process that is killed now tells no less than what left"


async def test_questions_that_are_repeated_are_booked_each_time(federation: Federation, site: Site) -> None:
    await site.send(message_entries.registration(REGISTRATION), lambda: site.channel.register(REGISTRATION))
    federation.unavailable = 200
    await site.retry.call(lambda: site.channel.await_round("", until_finished=True))
    assert federation.arrivals.messages["AwaitRoundRequest"] == 201
    assert site.booked_bytes >= federation.arrivals.wire_bytes
    assert len(read(site.egress_log.path).booked) == 2, "and not each in a line"
