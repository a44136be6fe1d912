"""The life of a site beside a real daemon over TLS: enrolled, looked at, moved to another machine, gone for good."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from fedpeft.errors import CertificateExpired, ClientMoved, IdentityInvalid, ServerUnreachable, StateInvalid
from fedpeft.identity import certificates, folder
from fedpeft.identity.folder import Identity
from fedpeft.identity.roles import TO_PROTO
from fedpeft.identity.subject import Role
from fedpeft.process.logs import logger
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft_client.commands import enroll, leave, status
from fedpeft_client.commands.left_state import LEFT, left_at
from fedpeft_client.egress.entries import EgressEntry, Kind, read
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.enrolment.renewal import Renewal
from fedpeft_client.owner.metrics import Metrics
from fedpeft_client.state import processes
from fedpeft_client.state.contact import Contact
from fedpeft_client.state.processes import Processes
from fedpeft_client.state.state_dir import StateDirectory, identity_folder
from fedpeft_client.timing import TIMING
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.traffic import Traffic
from fedpeft_server.access.authorities import Authorities
from fedpeft_server.access.files import Files
from fedpeft_server.commands import authority as authority_command

from ..server.conftest import RawClient
from ..server.secured import Federation, federation, held
from .conftest import write_site

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("preloaded")]


@pytest.fixture
async def secured(tmp_path: Path) -> AsyncIterator[Federation]:
    async with federation(tmp_path) as made:
        yield made


async def run(command: Callable[[list[str]], int], *arguments: str | Path) -> int:
    """Runs a command as its process would, beside the daemon in this one."""
    return await asyncio.to_thread(command, [str(each) for each in arguments])


async def enrolled(secured: Federation, state: Path, name: str = "a", role: Role = Role.CLIENT) -> Path:
    token = await secured.token(name, role)
    await run(enroll.main, token.encode(), "--state-dir", state)
    return state


async def registered(secured: Federation, state: Path) -> None:
    """Starts a client as far as its registration, and stops it: what the agent does, without a model."""
    with StateDirectory(state) as directory, EgressLog(state, secured.address) as egress_log:
        identity = at(secured, state)
        async with Channel(secured.address, identity.subject.name, directory.instance, identity) as channel:
            Traffic(channel, egress_log, Metrics(), Contact(state, secured.address))
            own = Processes(state, channel.process)
            request = fed.RegisterRequest(
                min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, earlier_processes=own.earlier()
            )
            own.registers()
            with egress_log.record(EgressEntry(Kind.REGISTRATION, request.ByteSize(), {})):
                await channel.register(request)
            own.registered()


def at(secured: Federation, state: Path) -> Identity:
    """Returns an identity that calls the daemon of this test, whatever port it has by now."""
    where = identity_folder(state)
    (where / "identity.toml").write_text(f'server = "{secured.address}"\n')
    return Identity.load(where)


async def shown(state: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    capsys.readouterr()
    assert await run(status.main, "--state-dir", state, "--json", *flags) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


async def test_a_client_that_was_moved_says_so_where_the_old_copy_starts(secured: Federation, tmp_path: Path) -> None:
    old = await enrolled(secured, tmp_path / "old")
    await registered(secured, old)
    new = tmp_path / "new"
    shutil.copytree(old, new)
    await registered(secured, new)
    for _ in range(2):
        with pytest.raises(ClientMoved, match="client a has gone on with a copy of this state, which called last at"):
            await registered(secured, old)
    await registered(secured, new)  # which the old one did not put out

    command = [sys.executable, "-m", "fedpeft_client", "--state-dir", str(old), "--data", str(tmp_path), "--dry-run"]
    found = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    said = (await found.communicate())[1].decode()
    assert found.returncode == 1
    assert f"stop the other and remove {old / processes.FILE}" in said.splitlines()[-1]

    (old / processes.FILE).unlink()  # as after a restore: this one is to go on
    await registered(secured, old)
    with pytest.raises(ClientMoved):
        await registered(secured, new)


async def test_that_it_moved_is_known_after_a_restart_of_the_server(tmp_path: Path) -> None:
    async with federation(tmp_path) as before:
        old = await enrolled(before, tmp_path / "old")
        await registered(before, old)
        shutil.copytree(old, tmp_path / "new")
        await registered(before, tmp_path / "new")
    async with federation(tmp_path) as after:
        with pytest.raises(ClientMoved):
            await registered(after, old)
        await registered(after, tmp_path / "new")


async def test_a_kill_at_any_instant_of_a_start_is_no_move(secured: Federation, tmp_path: Path) -> None:
    state = await enrolled(secured, tmp_path / "state")
    await registered(secured, state)
    own = Processes(state, "1" * 32)
    own.registers()  # killed before the call
    await registered(secured, state)
    identity = at(secured, state)
    with StateDirectory(state) as directory:
        async with Channel(secured.address, "a", directory.instance, identity) as channel:
            own = Processes(state, channel.process)
            own.registers()
            await channel.register(
                fed.RegisterRequest(
                    min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER, earlier_processes=own.earlier()
                )
            )  # killed before the answer was noted
    await registered(secured, state)
    kept = (state / processes.FILE).read_text().split()
    assert len(kept) == len(set(kept)) == 5


async def test_a_registration_that_arrives_late_shuts_no_later_process_out(secured: Federation, tmp_path: Path) -> None:
    """As where a daemon stood still: the call of a killed process is served after that of the next one."""
    state = await enrolled(secured, tmp_path / "state")
    with StateDirectory(state) as directory:
        instance = directory.instance
    async with Channel(secured.address, "a", instance, at(secured, state)) as killed:
        Processes(state, killed.process).registers()
        await registered(secured, state)
        await killed.register(fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER))
    await registered(secured, state)
    assert killed.process in Processes(state, "f" * 32).earlier()


@pytest.mark.parametrize("answered", [False, True])
def test_processes_are_kept_within_a_bound(answered: bool, tmp_path: Path) -> None:
    first = Processes(tmp_path, "a" * 32)
    first.registers()
    first.registered()
    for number in range(100):
        own = Processes(tmp_path, f"{number:032x}")
        own.registers()
        if answered:
            own.registered()
    kept = Processes(tmp_path, "f" * 32).earlier()
    assert len(kept) == processes.MOST
    newest = [f"{number:032x}" for number in range(100 - processes.MOST, 100)]
    assert kept == ([newest[-1], *newest[:-1]] if answered else ["a" * 32, *newest[1:]])
    (tmp_path / processes.FILE).write_text("damaged\n" + "b" * 32)
    assert Processes(tmp_path, "f" * 32).earlier() == ["b" * 32]


async def test_status_of_a_site_from_enrolment_to_a_day_of_work(
    secured: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = await enrolled(secured, tmp_path / "state")
    found = await shown(state, capsys)
    assert (found["identity"]["role"], found["identity"]["name"]) == ("client", "a")
    assert (found["process"], found["pending"], found["runs"]) == (None, None, [])
    assert found["last_contact"], "the server answered as it enrolled"
    (state / "policy.toml").write_text("[transfer]\nmax_bytes_a_day = 5_000\n")
    await registered(secured, state)
    with EgressLog(state, secured.address) as egress_log:
        answer = {"answer": "declined", "examples": 0, "reasons": ["50 epochs; its owner allows 5"]}
        with egress_log.record(EgressEntry(Kind.ANSWER, 40, answer, "run-aaaaaaaaaaaa", "long")):
            egress_log.sending(40)
        with egress_log.record(EgressEntry(Kind.ANSWER, 20, {"answer": "accepted"}, "run-bbbbbbbbbbbb", "emoji")):
            egress_log.sending(20)
        with egress_log.record(EgressEntry(Kind.UPDATE, 900, {}, "run-bbbbbbbbbbbb", round=1, ticket="t")):
            egress_log.sending(900)
    booked = sum(each.entry.wire_bytes for each in read(state / "ledger.jsonl").booked.values())
    with StateDirectory(state):
        found = await shown(state, capsys, "--ask")
    assert int(found["process"]) > 0
    assert found["reached"] and found["last_contact"]
    assert (found["bytes_today"], found["bytes_a_day"]) == (booked, 5000)
    assert {one["name"]: (one["answer"], one["reasons"], one["updates"]) for one in found["runs"]} == {
        "long": ("declined", ["50 epochs; its owner allows 5"], 0),
        "emoji": ("accepted", [], 1),
    }
    capsys.readouterr()
    assert await run(status.main, "--state-dir", state, "--ask") == 0
    said = capsys.readouterr().out
    assert "identity      client a\n" in said
    assert f"server        {secured.address}\n" in said
    assert "agent         not running\n" in said
    assert "run           long (run-aaaaaaaaaaaa): declined: 50 epochs; its owner allows 5\n" in said
    assert "run           emoji (run-bbbbbbbbbbbb): accepted, 1 update received\n" in said
    assert f"last 24 h     {booked / 1024:.1f} KiB sent; the policy allows 4.9 KiB a day\n" in said
    assert "asked now     it answers, and takes the certificate\n" in said


async def test_status_says_that_the_server_refused_and_forgets_it_once_it_answers(
    secured: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = await enrolled(secured, tmp_path / "state")
    await secured.revoke(Role.CLIENT, "a")
    data = write_site(tmp_path / "data.parquet", seed=1)
    words = (
        "-m",
        "fedpeft_client",
        "--state-dir",
        str(state),
        "--data",
        str(data),
        "--once",
    )
    client = await asyncio.create_subprocess_exec(sys.executable, *words, stderr=asyncio.subprocess.DEVNULL)
    assert await client.wait() == 5
    found = await shown(state, capsys)
    assert found["refused_at"] and "revoked" in found["refusal"]
    await run(status.main, "--state-dir", state)
    assert "\nrefused       by the server at " in capsys.readouterr().out
    token = await secured.token("a")
    await run(enroll.main, token.encode(), "--state-dir", state, "--replace")
    found = await shown(state, capsys)
    assert (found["refused_at"], found["refusal"]) == (None, "")


async def test_status_of_a_client_over_plain_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state").mkdir()
    Contact(tmp_path / "state", "127.0.0.1:7070").note()
    await run(status.main, "--state-dir", tmp_path / "state")
    said = capsys.readouterr().out
    assert "identity      none: this client calls over plain text, without a certificate\n" in said
    assert "server        127.0.0.1:7070\n" in said


async def test_status_names_what_cannot_be_read_and_asks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with federation(tmp_path) as gone:
        state = await enrolled(gone, tmp_path / "state")
    (state / "policy.toml").write_text("[training]\nmax_epoch = 1\n")
    (state / "pending").mkdir()
    (state / "pending" / "ticket.json").write_text("{")
    found = await shown(state, capsys)
    assert len(found["problems"]) == 2 and "max_epoch" in str(found["problems"])
    assert await run(status.main, "--state-dir", state, "--ask") == 3
    assert "nothing listens on port" in capsys.readouterr().out
    folder.key_path(identity_folder(state)).chmod(0o644)
    assert "is open to others" in (await shown(state, capsys))["identity"]["problem"]
    with pytest.raises(StateInvalid, match="there is no state directory"):
        status.main(["--state-dir", str(tmp_path / "nowhere")])


async def test_a_site_leaves_for_good(secured: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = await enrolled(secured, tmp_path / "state")
    await held(secured, "a", "b")  # client a has an open ticket
    (state / "pending").mkdir()
    (state / "runs" / "run-x").mkdir(parents=True)
    (state / "runs" / "run-x" / "residual.safetensors").write_bytes(bytes(2048))
    (state / "policy.toml").write_text("")
    at(secured, state)
    with StateDirectory(state), pytest.raises(StateInvalid, match="is in use by another fedpeft-client"):
        await run(leave.main, "--state-dir", state)
    capsys.readouterr()
    assert await run(leave.main, "--state-dir", state, "--reason", "the study is over") == 0
    said = capsys.readouterr()
    assert f"left {secured.address} as client a: the server refuses this identity from now on" in said.out
    assert "1 open ticket given back, so no round waits for this client" in said.out
    assert f"kept     {state / 'identity'}: key and certificate, which the server refuses now" in said.out
    assert "your data was not touched" in said.err
    assert left_at(state) is not None and not (state / "pending").exists()
    (entry,) = [e for e in read(state / "ledger.jsonl").booked.values() if e.entry.kind is Kind.LEAVE]
    assert entry.entry.said == {"reason": "the study is over"} and entry.outcome == "received"
    (identity,) = [
        one
        for one in (await secured.access().ListIdentities(access.ListIdentitiesRequest())).identities
        if (one.role, one.name) == (TO_PROTO[Role.CLIENT], "a")
    ]
    assert identity.reason == "the study is over" and identity.HasField("revoked_at")
    assert (await shown(state, capsys))["left_at"]

    (state / LEFT).write_text("2026-01-02T03:04:05+00:00\n")
    assert await run(leave.main, "--state-dir", state) == 0
    said = capsys.readouterr()
    assert f"client a left {secured.address} already, at 2026-01-02 03:04 UTC: the server refuses this" in said.out
    assert (state / LEFT).read_text() == "2026-01-02T03:04:05+00:00\n"
    (state / LEFT).unlink()  # what a leave that was killed after the server heard it leaves behind

    assert await run(leave.main, "--state-dir", state, "--remove") == 0
    said = capsys.readouterr()
    assert f"{secured.address} had revoked client a already" in said.out
    assert f"removed  {state / 'identity'}: key and certificate" in said.out
    assert f"removed  {state / 'runs'}: adapters, residuals and local tensors, 2.0 KiB" in said.out
    assert f"kept     {state / 'ledger.jsonl'}: the ledger: what left this device" in said.out
    assert sorted(path.name for path in state.iterdir()) == ["ledger.jsonl", "left", "lock", "policy.toml"]
    assert f"rm -r {state}" in said.err

    await enrolled(secured, state)  # and comes back with a token
    assert left_at(state) is None
    await RawClient(secured.with_certificate(at(secured, state).key, at(secured, state).certificate), "a").register()


async def test_who_cannot_tell_the_server_keeps_everything_unless_told_otherwise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with federation(tmp_path) as gone:
        state = await enrolled(gone, tmp_path / "state")
        authority, key = gone.authority, Identity.load(identity_folder(state)).key
    monkeypatch.setattr(leave, "TIMING", replace(TIMING, call_s=0.5))
    with pytest.raises(ServerUnreachable, match="Nothing was changed: repeat this when the server is back"):
        await run(leave.main, "--state-dir", state, "--remove")
    assert folder.exists(identity_folder(state)) and left_at(state) is None
    subject, long_ago = Identity.load(identity_folder(state)).subject, datetime.now(UTC) - timedelta(days=9)
    ended = authority.issue(subject, key.public_key(), timedelta(days=7), long_ago)
    folder.write_certificate(identity_folder(state), [ended])
    with pytest.raises(CertificateExpired, match="leave without telling it"):
        await run(leave.main, "--state-dir", state)
    assert await run(leave.main, "--state-dir", state, "--remove", "--offline") == 0
    assert "ask its operator for fedpeft client revoke a" in capsys.readouterr().err
    assert not folder.exists(identity_folder(state))


async def test_an_operators_identity_does_not_leave(secured: Federation, tmp_path: Path) -> None:
    state = await enrolled(secured, tmp_path / "state", "vera", Role.VIEWER)
    with pytest.raises(IdentityInvalid, match="is the identity of viewer vera, which cannot take part in runs"):
        await run(leave.main, "--state-dir", state)
    assert certificates.load(folder.certificate_path(identity_folder(state)))


async def test_clients_that_wait_for_work_follow_a_new_authority(tmp_path: Path) -> None:
    """Two clients call all the time, with their own renewal, while the authority is replaced: no call fails."""
    data = ["--data-dir", str(tmp_path / "data")]
    async with federation(tmp_path) as secured:
        sites = [await enrolled(secured, tmp_path / name, name) for name in ("a", "b")]
        identities = [at(secured, site) for site in sites]
        authority_command.main(["rotate", *data])
        await secured.server.refresh.refresh()
        calls: Counter[str] = Counter()
        async with AsyncExitStack() as stack:
            channels = []
            for identity in identities:
                name = identity.subject.name
                channel = await stack.enter_async_context(Channel(secured.address, name, name.rjust(32, "0"), identity))
                channels.append(channel)
            tasks = [asyncio.create_task(calls_on(channel, calls)) for channel in channels]
            await renewed(channels, identities, stop_at=2)
            authority_command.main(["finish", *data])
            await secured.server.refresh.refresh()
            (new,) = Authorities.read(Files(tmp_path / "data" / "identity")).trusted
            await renewed(channels, [Identity.load(identity.folder) for identity in identities], stop_at=1)
            before = calls.copy()
            async with asyncio.timeout(30):
                while any(calls[name] <= before[name] + 2 for name in "ab"):
                    await asyncio.sleep(0.01)
            for task in tasks:
                assert not task.done() or task.result()
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert [Identity.load(identity.folder).authority for identity in identities] == [(new,), (new,)]


async def calls_on(channel: Channel, calls: Counter[str]) -> None:
    while True:
        await channel.register(fed.RegisterRequest(min_protocol=1, max_protocol=1, role=fed.CLIENT_ROLE_TRAINER))
        calls[channel._metadata["fedpeft-client"]] += 1
        await asyncio.sleep(0.01)


async def renewed(channels: list[Channel], identities: list[Identity], stop_at: int) -> None:
    """Lets each client renew as it does half-way, until it trusts so many authorities."""
    for channel, identity in zip(channels, identities, strict=True):
        half = certificates.renewal(identity.certificate) + timedelta(days=2)  # a clock past the half of its life
        keeping = asyncio.create_task(Renewal(identity, channel, logger(), lambda half=half: half).run())  # type: ignore[misc]
        async with asyncio.timeout(30):
            while len(Identity.load(identity.folder).authority) != stop_at or keeping.done():
                assert not keeping.done(), keeping
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)  # the channel is opened anew in the same turn of the loop
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
