"""A client's certificate while it runs: renewed, taken from the folder, or at its end; what is under way goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import structlog
from cryptography import x509
from structlog.testing import LogCapture

from fedpeft.errors import (
    CertificateExpired,
    CertificateRevoked,
    Internal,
    NoAuthority,
    ServerUnreachable,
    StateInvalid,
)
from fedpeft.identity import certificates, folder, keys
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.process.addresses import Address
from fedpeft.rpc.status import abort
from fedpeft.v1 import federation_service_pb2 as pb
from fedpeft.v1 import federation_service_pb2_grpc as pb_grpc
from fedpeft.v1 import tensor_pb2
from fedpeft_client.enrolment import renewal
from fedpeft_client.enrolment.renewal import Renewal
from fedpeft_client.timing import TIMING, Timing
from fedpeft_client.uplink.channel import Channel
from fedpeft_client.uplink.retry import Retry

from ...operator.access_double import Double, serving

INSTANCE = "0" * 32


class Federation(pb_grpc.FederationServiceServicer):
    """Answers Register, and a pull in two pieces of which the second waits; notes with which certificate."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.go_on = asyncio.Event()
        self.refusal: Exception | None = None

    def _note(self, call: str, context: grpc.aio.ServicerContext) -> None:
        (pem,) = context.auth_context()["x509_pem_cert"]
        self.seen.append((call, certificates.fingerprint(certificates.parse(pem)[0])))

    async def Register(self, request: pb.RegisterRequest, context: grpc.aio.ServicerContext) -> pb.RegisterResponse:
        self._note("Register", context)
        if self.refusal is not None:
            await abort(context, self.refusal)
        return pb.RegisterResponse()

    async def PullAdapter(
        self, request: pb.PullAdapterRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.PullAdapterResponse]:
        self._note("PullAdapter", context)
        yield pb.PullAdapterResponse(header=pb.PullHeader(version=1))
        await self.go_on.wait()
        yield pb.PullAdapterResponse(header=pb.PullHeader(version=2))

    async def PushUpdate(
        self, requests: AsyncIterator[pb.PushUpdateRequest], context: grpc.aio.ServicerContext
    ) -> pb.PushUpdateResponse:
        self._note("PushUpdate", context)
        async for _ in requests:
            continue
        return pb.PushUpdateResponse()


class Line:
    """The way to a server, which can be another one later; a slow one lets no more than that through at first."""

    def __init__(self, server: str, slow_after: int | None = None) -> None:
        self.server = server
        self.held, self.go_on = asyncio.Event(), asyncio.Event()
        self._slow_after = slow_after
        self._passing: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        async with await asyncio.start_server(self._begin, "127.0.0.1", 0) as line:
            yield f"127.0.0.1:{line.sockets[0].getsockname()[1]}"
            for task in self._passing:
                task.cancel()
            await asyncio.gather(*self._passing, return_exceptions=True)

    def _begin(self, near: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        self._passing.append(asyncio.create_task(self._pass(near, answers)))

    async def _pass(self, near: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        to = Address.parse(self.server)
        slow_after, self._slow_after = self._slow_after, None  # the first connection alone
        far, onward = await asyncio.open_connection(to.host, to.port)
        try:
            await asyncio.gather(self._pump(near, onward, slow_after), self._pump(far, answers, None))
        finally:
            for sink in (onward, answers):
                sink.close()
                with suppress(ConnectionError):  # whoever spoke has gone
                    await sink.wait_closed()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, slow_after: int | None) -> None:
        passed = 0
        with suppress(ConnectionError):
            while data := await source.read(16_384):
                passed += len(data)
                if slow_after is not None and passed > slow_after:
                    self.held.set()
                    await self.go_on.wait()
                sink.write(data)
                await sink.drain()
        sink.close()


@pytest.fixture
async def federation() -> Federation:
    return Federation()


@pytest.fixture
async def double(federation: Federation) -> AsyncIterator[Double]:
    async with serving(Double(), lambda s: pb_grpc.add_FederationServiceServicer_to_server(federation, s)) as made:
        yield made


@pytest.fixture
def log() -> tuple[LogCapture, renewal.Log]:
    heard = LogCapture()
    return heard, structlog.wrap_logger(None, processors=[heard])


def events(heard: LogCapture) -> list[str]:
    return [entry["event"] for entry in heard.entries]


def short(double: Double, where: Path, seconds: float) -> Identity:
    """Enrolls with a certificate that ends soon; later ones are good for an hour."""
    double.life = timedelta(seconds=seconds)
    identity = double.enrolled(where)
    double.life = timedelta(hours=1)
    return identity


@asynccontextmanager
async def kept(
    double: Double, identity: Identity, log: renewal.Log, timing: Timing = TIMING
) -> AsyncIterator[tuple[Channel, asyncio.Task[None]]]:
    async with Channel(double.server, "noto", INSTANCE, identity, timing) as channel:
        keeping = asyncio.create_task(Renewal(identity, channel, log).run())
        yield channel, keeping
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def until_replaced(identity: Identity) -> Identity:
    async with asyncio.timeout(10):
        while (found := Identity.load(identity.folder)).chain == identity.chain:
            await asyncio.sleep(0.01)
    return found


async def test_a_certificate_past_its_half_is_renewed_at_once(
    double: Double, federation: Federation, tmp_path: Path, log: tuple[LogCapture, renewal.Log]
) -> None:
    old = short(double, tmp_path, 30)  # it began ten minutes ago, so its half has passed
    async with kept(double, old, log[1]) as (channel, _):
        await channel.register(pb.RegisterRequest())
        new = await until_replaced(old)
        await asyncio.sleep(0.05)
        await channel.register(pb.RegisterRequest())
    assert federation.seen == [
        ("Register", certificates.fingerprint(old.certificate)),
        ("Register", certificates.fingerprint(new.certificate)),
    ]
    assert double.asked == ["Renew"]
    assert events(log[0]) == ["certificate renewed"]
    assert new.certificate.not_valid_after_utc > datetime.now(UTC) + timedelta(minutes=50)


async def test_what_is_under_way_ends_on_the_old_connection(
    double: Double, federation: Federation, tmp_path: Path
) -> None:
    old = double.enrolled(tmp_path)
    async with Channel(double.server, "noto", INSTANCE, old) as channel:
        pull = channel.pull_adapter(pb.PullAdapterRequest(run="r"))
        assert (await pull.read()).header.version == 1
        new = double.enrolled(tmp_path)
        channel.reopen(new)
        await channel.register(pb.RegisterRequest())
        assert len(channel._old) == 1
        federation.go_on.set()
        assert (await pull.read()).header.version == 2
        assert await pull.read() is grpc.aio.EOF
        async with asyncio.timeout(5):
            while channel._old:
                await asyncio.sleep(0.01)
    assert federation.seen == [
        ("PullAdapter", certificates.fingerprint(old.certificate)),
        ("Register", certificates.fingerprint(new.certificate)),
    ]


async def test_a_certificate_is_renewed_while_an_upload_is_held_up(
    double: Double, federation: Federation, tmp_path: Path, log: tuple[LogCapture, renewal.Log]
) -> None:
    old = short(double, tmp_path, 30)
    line = Line(double.server, slow_after=256 * 1024)
    async with (
        line.serving() as server,
        Channel(server, "noto", INSTANCE, old) as channel,
        channel.own_connection() as own,
    ):
        call = channel.push_update(own)
        chunk = pb.PushUpdateRequest(chunk=tensor_pb2.Chunk(data=bytes(1024 * 1024)))

        async def upload() -> None:
            for _ in range(32):  # more than all buffers on the way take up
                await call.write(chunk)
            await call.done_writing()

        uploading = asyncio.create_task(upload())
        await line.held.wait()
        keeping = asyncio.create_task(Renewal(old, channel, log[1]).run())
        new = await until_replaced(old)
        await asyncio.sleep(0.05)
        await channel.register(pb.RegisterRequest())
        assert not uploading.done()
        line.go_on.set()
        await uploading
        await call
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
    assert federation.seen == [
        ("PushUpdate", certificates.fingerprint(old.certificate)),
        ("Register", certificates.fingerprint(new.certificate)),
    ]


async def test_a_call_that_was_not_made_holds_no_connection(double: Double, tmp_path: Path) -> None:
    async with Channel(double.server, "noto", INSTANCE, double.enrolled(tmp_path)) as channel:

        def cannot_be_booked(_: object) -> None:
            raise StateInvalid("cannot write the ledger")

        channel.sent = cannot_be_booked
        with pytest.raises(StateInvalid):
            await channel.register(pb.RegisterRequest())
        channel.reopen(double.enrolled(tmp_path))
        assert channel._old == []


async def test_an_unused_connection_is_closed_at_once(double: Double, tmp_path: Path) -> None:
    async with Channel(double.server, "noto", INSTANCE, double.enrolled(tmp_path)) as channel:
        await channel.register(pb.RegisterRequest())
        channel.reopen(double.enrolled(tmp_path))
        assert channel._old == []
        await channel.register(pb.RegisterRequest())


async def test_failures_are_said_and_tried_again(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: tuple[LogCapture, renewal.Log]
) -> None:
    double.failures = [Internal("the disk is on fire")] * 3
    old = short(double, tmp_path, 30)
    async with kept(double, old, log[1], replace(TIMING, renewal_first_pause_s=0.02)):
        await until_replaced(old)
        await asyncio.sleep(0.05)
    assert double.asked == ["Renew"] * 4
    assert events(log[0]) == ["certificate was not renewed; trying again"] * 3 + ["certificate renewed"]
    assert log[0].entries[0]["cause"] == "the disk is on fire"


async def test_pauses_grow(double: Double, tmp_path: Path, log: tuple[LogCapture, renewal.Log]) -> None:
    identity = double.enrolled(tmp_path)
    async with Channel(double.server, "noto", INSTANCE, identity) as channel:
        keeper = Renewal(identity, channel, log[1])
        pauses = []
        for _ in range(12):
            double.failures = [Internal("no")]
            before = datetime.now(UTC)
            await keeper._attempt()
            pauses.append((keeper._due - before).total_seconds())
    assert 2.4 < pauses[0] < 5.2
    assert 290 < pauses[-1] < 601
    assert all(later > earlier for earlier, later in zip(pauses[:6], pauses[2:8], strict=True))


async def test_an_authority_elsewhere_replaces_the_file(
    double: Double,
    federation: Federation,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    log: tuple[LogCapture, renewal.Log],
) -> None:
    double.failures = [NoAuthority("the server has no key to sign with")] * 9
    old = short(double, tmp_path, 30)
    async with kept(double, old, log[1], replace(TIMING, renewal_check_s=0.05)) as (channel, _):
        await asyncio.sleep(0.3)
        assert double.asked == ["Renew"], "asked once"
        chain = [double.authority.issue(Subject(Role.CLIENT, "noto"), old.key.public_key(), timedelta(hours=1))]
        folder.write_certificate(tmp_path, chain)
        async with asyncio.timeout(5):
            while len(log[0].entries) < 2:
                await asyncio.sleep(0.01)
        await channel.register(pb.RegisterRequest())
    assert federation.seen == [("Register", certificates.fingerprint(chain[0]))]
    assert [event[:34] for event in events(log[0])] == ["the server issues no certificates;", "certificate renewed"]


async def test_another_ones_certificate_is_not_taken(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: tuple[LogCapture, renewal.Log]
) -> None:
    identity = double.enrolled(tmp_path)
    async with Channel(double.server, "noto", INSTANCE, identity) as channel:
        keeper = Renewal(identity, channel, log[1])
        assert keeper._replaced() is None
        double.enrolled(tmp_path, "mallory")
        assert keeper._replaced() is None
        folder.certificate_path(tmp_path).write_text("half")
        assert keeper._replaced() is None


async def test_what_a_backup_put_back_is_not_taken(
    double: Double, tmp_path: Path, log: tuple[LogCapture, renewal.Log]
) -> None:
    now = datetime.now(UTC)
    identity = double.enrolled(tmp_path)

    def put(begin: timedelta, life: timedelta) -> list[x509.Certificate]:
        made = double.authority.issue(Subject(Role.CLIENT, "noto"), identity.key.public_key(), life, now + begin)
        folder.write_certificate(tmp_path, [made])
        return [made]

    async with Channel(double.server, "noto", INSTANCE, identity) as channel:
        keeper = Renewal(identity, channel, log[1])
        put(timedelta(days=-1), timedelta(days=7))
        assert keeper._replaced() is None, "older, though it lasts longer"
        put(timedelta(seconds=5), timedelta(minutes=-5))
        assert keeper._replaced() is None, "at its end"
        put(timedelta(hours=5), timedelta(hours=1))
        assert keeper._replaced() is None, "not begun"
        chain = put(timedelta(seconds=5), timedelta(minutes=5))
        assert (found := keeper._replaced()) is not None and list(found.chain) == chain
        folder.key_path(tmp_path).write_bytes(keys.to_pem(keys.make()))
        assert keeper._replaced() is None, "of another key"


async def test_the_end_is_said_with_the_cure(
    double: Double, tmp_path: Path, log: tuple[LogCapture, renewal.Log]
) -> None:
    double.failures = [Internal("no")] * 9
    ends = short(double, tmp_path, 1.5)
    async with kept(double, ends, log[1]) as (_, keeping):
        with pytest.raises(CertificateExpired, match=r"the certificate of client noto ended at .* ask the operator"):
            async with asyncio.timeout(20):
                await keeping


async def test_a_revoked_client_ends(double: Double, tmp_path: Path, log: tuple[LogCapture, renewal.Log]) -> None:
    double.failures = [CertificateRevoked("client noto was revoked")]
    async with kept(double, short(double, tmp_path, 30), log[1]) as (_, keeping):
        with pytest.raises(CertificateRevoked):
            async with asyncio.timeout(20):
                await keeping


async def test_a_connection_older_than_the_certificate_is_made_anew(
    double: Double, federation: Federation, tmp_path: Path
) -> None:
    async with Channel(double.server, "noto", INSTANCE, double.enrolled(tmp_path)) as channel:
        federation.refusal = CertificateExpired("the certificate has ended since the connection was made")
        with pytest.raises(ServerUnreachable, match="has ended since"):
            await channel.register(pb.RegisterRequest())
        federation.refusal = None
        await channel.register(pb.RegisterRequest())
    assert len(federation.seen) == 2


async def test_a_lost_server_is_looked_into_once(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedpeft_client.uplink import channel as module

    looked: list[str] = []
    explain = module.diagnosis.explain

    async def counted(server: str, trust: module.Trust | None) -> module.Fault | None:
        looked.append(server)
        return await explain(server, trust)

    monkeypatch.setattr(module.diagnosis, "explain", counted)
    identity = double.enrolled(tmp_path)
    closed = Identity(identity.folder, "127.0.0.1:1", identity.key, identity.chain, identity.authority)
    async with Channel("127.0.0.1:1", "noto", INSTANCE, closed) as channel:
        for _ in range(3):
            with pytest.raises(ServerUnreachable, match="nothing listens on port 1"):
                await channel.register(pb.RegisterRequest())
    assert looked == ["127.0.0.1:1"]


async def test_what_waiting_does_not_mend_is_named_at_each_change(
    double: Double, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: tuple[LogCapture, renewal.Log]
) -> None:
    timing = replace(TIMING, explain_every_s=0.0)
    foreigner, plainly = "another federation's server", "serves plain text"
    async with serving(Double()) as foreign:
        line, plain = Line(foreign.server), grpc.aio.server()
        port = plain.add_insecure_port("127.0.0.1:0")
        await plain.start()
        identity = double.enrolled(tmp_path)
        async with line.serving() as server, Channel(server, "noto", INSTANCE, identity, timing) as channel:
            waiting = asyncio.create_task(Retry(log[1], None).call(lambda: channel.register(pb.RegisterRequest())))
            for cause, following in ((foreigner, f"127.0.0.1:{port}"), (plainly, double.server)):
                async with asyncio.timeout(20):
                    while not any(cause in entry["cause"] for entry in log[0].entries):
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.2)
                line.server = following
            await waiting
        await plain.stop(None)
    told = log[0].entries
    named = [entry for entry in told if entry["event"].startswith("server cannot be used until this is fixed")]
    # a look takes two connections, and the line may be switched between them
    named = [entry for entry in named if "of an authority that is not trusted here" not in entry["cause"]]
    assert [entry["log_level"] for entry in named] == ["warning", "warning"]
    assert foreigner in named[0]["cause"]
    assert plainly in named[1]["cause"]
    assert told[0] == named[0] and told[-1]["event"] == "server is back"
