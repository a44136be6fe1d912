"""AccessService: enrolment, revocation, and the audit log. The semantics are in `access_service.proto`."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedpeft.errors import (
    CertificateMissing,
    DatabaseUnavailable,
    IdentityInvalid,
    NoAuthority,
    SelfRevocation,
    SigningRequestInvalid,
    StateInvalid,
    SubjectInvalid,
    TicketNotFound,
    TokenNotFound,
    TooManyCertificates,
    Unavailable,
)
from fedpeft.identity import certificates, requests, token
from fedpeft.identity.authority import Authority
from fedpeft.identity.requests import PublicKey
from fedpeft.identity.roles import OF_PROTO
from fedpeft.identity.subject import Role, Subject
from fedpeft.identity.token import EnrollmentToken
from fedpeft.v1 import access_service_pb2 as pb
from fedpeft.v1 import access_service_pb2_grpc as pb_grpc
from fedpeft_server.access import untrusted_text
from fedpeft_server.access.admission import Admission
from fedpeft_server.access.call import CALL, actor
from fedpeft_server.access.certificates import ServerCertificates
from fedpeft_server.clock import MOST_APART_S
from fedpeft_server.rpc import pages
from fedpeft_server.rpc.messages import audit_message, identity_message, token_message
from fedpeft_server.rpc.sessions import Sessions
from fedpeft_server.runs.runs import Runs
from fedpeft_server.store.identities import Issue, Issued
from fedpeft_server.store.rows import IdentityRow, TokenRow
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import TaskSet, shielded
from fedpeft_server.timing import Timing
from fedpeft_server.uploads.incoming import Context

log = structlog.get_logger()

PERSON_LIFE = timedelta(days=90)
"""Life of the certificates of operators and viewers; somebody who calls seldom must not be locked out soon."""
TOKEN_LIFE_S = 86_400
MIN_TOKEN_LIFE_S = 60
MAX_TOKEN_LIFE_S = 30 * 86_400
MOST_CERTIFICATES = 8
"""A name is given so many within half the life of one, and needs one: each is a line in the audit log for ever."""


@dataclass(frozen=True)
class Addresses:
    """Addresses at which the server is reached.

    Attributes:
        server: HOST:PORT for everything but enrolment.
        enrollment: HOST:PORT where devices enroll.
    """

    server: str
    enrollment: str


class Access(pb_grpc.AccessServiceServicer):
    """The service that says who may speak.

    Args:
        store: Store of tokens and identities.
        admission: Told of revocations.
        runs: Told of clients that will not come back.
        sessions: Likewise.
        own: The server's certificates; None if it has none.
        take_up: Has `own` follow its files, so that a command that replaced one holds for the next certificate.
        addresses: Returns where the server is reached; asked for each token, as the certificate's names may change.
        life: Validity of the certificates of clients and evaluators.
        timing: Delay of a certificate for somebody who is let in again.

    Attributes:
        tasks: Revocations that are under way.
    """

    def __init__(
        self,
        store: Store,
        admission: Admission,
        runs: Runs,
        sessions: Sessions,
        own: ServerCertificates | None,
        take_up: Callable[[], Awaitable[None]],
        addresses: Callable[[], Addresses],
        life: timedelta,
        timing: Timing,
    ) -> None:
        self._store = store
        self._identities = store.db.identities
        self._admission = admission
        self._runs = runs
        self._sessions = sessions
        self._own = own
        self._take_up = take_up
        self._addresses = addresses
        self._life = life
        self._timing = timing
        self._issued_to: dict[Subject, deque[float]] = defaultdict(lambda: deque(maxlen=MOST_CERTIFICATES))
        self.tasks = TaskSet()

    async def Enroll(self, request: pb.EnrollRequest, context: Context) -> pb.EnrollResponse:
        """Gives a device its first certificate."""
        authority, key = await self._authority(), _key(request.signing_request)
        made: list[x509.Certificate] = []

        def issue(subject: Subject, after: float) -> Issued:
            if after - time.time() > MOST_APART_S:
                raise Unavailable(
                    f"{subject} was locked out at a time that is {after - time.time():.0f} s ahead of this server's "
                    "clock, and a certificate must begin later: set the clock of the server's machine"
                )
            if not made or made[0].not_valid_before_utc.timestamp() <= after:  # else the transaction is repeated
                made[:] = [self._issue(authority, subject, key, after)]
            return _issued(made[0], authority)

        secret, public = token.digest(request.secret).hex(), _digest(key)
        used = await self._enroll(secret, public, issue)
        software = untrusted_text.software(request.software)
        # Who was let in again just now has a certificate that begins in the next second: the device must not be early.
        begin = made[0].not_valid_before_utc.timestamp() + self._timing.certificate_tick_s
        await asyncio.sleep(begin - time.time())
        log.info("enrolled", subject=str(used.subject), token=used.id, software=software)
        return pb.EnrollResponse(
            certificate=certificates.to_pem(*made), server=self._addresses().server, authority=self._trusted()
        )

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        """Gives the caller its next certificate."""
        authority, key = await self._authority(), _key(request.signing_request)
        subject = CALL.get().caller.subject
        if subject is None:
            raise CertificateMissing("a certificate is renewed over a connection that was made with it")
        certificate = self._issue(authority, subject, key, self._admission.refused_until(subject))
        await self._store.transact(self._identities.renewed, subject, _issued(certificate, authority))
        log.info("certificate renewed", subject=str(subject))
        return pb.RenewResponse(certificate=certificates.to_pem(certificate), authority=self._trusted())

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """Takes the caller out for good, as it wishes."""
        subject = CALL.get().caller.subject
        if subject is None:
            raise CertificateMissing(
                "this connection is plain text, so there is no identity to revoke; it is enough to stop the client"
            )
        reason = untrusted_text.reason(request.reason) or "it left"
        tickets = await self._leave(subject, reason, asyncio.current_task())
        return pb.LeaveResponse(tickets=tickets)

    async def CreateToken(self, request: pb.CreateTokenRequest, context: Context) -> pb.CreateTokenResponse:
        """Makes an enrolment token."""
        subject, life_s = _subject(request.role, request.name), request.life_s or TOKEN_LIFE_S
        if not MIN_TOKEN_LIFE_S <= life_s <= MAX_TOKEN_LIFE_S:
            fault = f"must be {MIN_TOKEN_LIFE_S} to {MAX_TOKEN_LIFE_S}"
            raise SubjectInvalid(f"life_s is {life_s}; it {fault}", (("life_s", fault),))
        await self._authority()
        assert self._own is not None
        where, now = self._addresses(), self._store.clock.time()
        made = EnrollmentToken.make(where.server, where.enrollment, self._own.root)
        row = TokenRow(made.digest.hex(), subject, now, actor(), now + life_s)
        await self._store.transact(self._identities.add_token, row)
        log.info("token created", subject=str(subject), token=row.id, by=row.created_by)
        return pb.CreateTokenResponse(token=token_message(row), line=made.encode())

    async def ListTokens(self, request: pb.ListTokensRequest, context: Context) -> pb.ListTokensResponse:
        """Shows enrolment tokens, a page at a time."""
        most = pages.size(request.page_size)
        place = pages.position(request.page_token, of=("tokens",), first=(0.0, ""))
        rows = await self._store.read(self._identities.tokens_after, place, most + 1)
        tokens = pages.fitting(map(token_message, rows[:most]))
        last = rows[len(tokens) - 1] if len(tokens) < len(rows) else None
        return pb.ListTokensResponse(
            tokens=tokens,
            next_page_token=pages.token((last.created_at, last.secret_sha256), of=("tokens",)) if last else "",
        )

    async def DeleteToken(self, request: pb.DeleteTokenRequest, context: Context) -> pb.DeleteTokenResponse:
        """Makes a token worthless."""
        if len(request.id) != TokenRow.ID_DIGITS:
            raise TokenNotFound(f"there is no enrolment token {request.id[:80]!r}")
        await self._store.transact(self._identities.delete_token, request.id, actor())
        return pb.DeleteTokenResponse()

    async def RevokeIdentity(self, request: pb.RevokeIdentityRequest, context: Context) -> pb.RevokeIdentityResponse:
        """Refuses somebody from now on."""
        subject = _subject(request.role, request.name)
        if subject == CALL.get().caller.subject:
            raise SelfRevocation(f"you are {subject}; have another operator revoke you")
        row = await self._revoke(subject, untrusted_text.reason(request.reason), actor(), unseen=request.unseen)
        return pb.RevokeIdentityResponse(identity=identity_message(row, self._trusts(row)))

    async def RestoreIdentity(self, request: pb.RestoreIdentityRequest, context: Context) -> pb.RestoreIdentityResponse:
        """Lets somebody who was revoked in again, with another certificate."""
        row = await self._restore(_subject(request.role, request.name), actor())
        return pb.RestoreIdentityResponse(identity=identity_message(row, self._trusts(row)))

    async def ListIdentities(self, request: pb.ListIdentitiesRequest, context: Context) -> pb.ListIdentitiesResponse:
        """Shows whoever was enrolled or revoked, a page at a time."""
        most = pages.size(request.page_size)
        place = pages.position(request.page_token, of=("identities",), first=("", ""))
        rows = await self._store.read(self._identities.after, place, most + 1)
        identities = pages.fitting(identity_message(row, self._trusts(row)) for row in rows[:most])
        last = rows[len(identities) - 1].subject if len(identities) < len(rows) else None
        return pb.ListIdentitiesResponse(
            identities=identities,
            next_page_token=pages.token((last.role, last.name), of=("identities",)) if last else "",
        )

    async def ListAuditEntries(
        self, request: pb.ListAuditEntriesRequest, context: Context
    ) -> pb.ListAuditEntriesResponse:
        """Shows the audit log, a page at a time."""
        most, of = pages.size(request.page_size), ("audit", request.after)
        (after,) = pages.position(request.page_token, of=of, first=(min(request.after, pages.NUMBERS - 1),))
        rows = await self._store.read(self._store.db.transactions.entries_after, after, most + 1)
        entries = pages.fitting(map(audit_message, rows[:most]))
        more = len(entries) < len(rows)
        return pb.ListAuditEntriesResponse(
            entries=entries, next_page_token=pages.token((rows[len(entries) - 1].number,), of=of) if more else ""
        )

    # The database's answers are taken up in its order, so memory ends as it does where two of these meet.

    @shielded
    async def _enroll(self, secret: str, public: str, issue: Issue) -> TokenRow:
        now = self._store.clock.time()
        used, row = await self._store.transact(self._identities.enroll, secret, public, now, issue)
        self._admission.know(row)
        return used

    @shielded
    async def _restore(self, subject: Subject, by: str) -> IdentityRow:
        row = await self._store.transact(self._identities.restore, subject, self._store.clock.time(), by)
        self._admission.know(row)
        log.warning("identity restored", subject=str(subject), by=by)
        return row

    @shielded
    async def _revoke(self, subject: Subject, reason: str, by: str, *, unseen: bool) -> IdentityRow:
        before = self._admission.refused_until(subject)
        self._admission.revoke(subject)
        try:
            now = self._store.clock.time()
            row = await self._store.transact(self._identities.revoke, subject, now, reason, by, unseen=unseen)
        except DatabaseUnavailable:  # it may be written: refusing somebody in vain is the smaller harm
            log.error("whether an identity is revoked is unknown; it is refused until a restart", subject=str(subject))
            raise
        except BaseException:
            self._admission.take_back(subject, before)
            raise
        self._admission.revoke(subject)
        log.warning("identity revoked", subject=str(subject), by=by, reason=reason)
        await self.dismiss(subject, by, "its certificate was revoked")
        return row

    @shielded
    async def _leave(self, subject: Subject, reason: str, spared: asyncio.Task[object] | None) -> int:
        """Revokes a subject at its own wish; `spared` is the task of its call. Returns how many tickets were open."""
        now = self._store.clock.time()
        row = await self._store.transact(self._identities.revoke, subject, now, reason, str(subject), left=True)
        self._admission.know(row)
        self._admission.revoke(subject, sparing=spared)
        log.warning("client left the federation", subject=str(subject), reason=reason)
        return await self.dismiss(subject, str(subject), "it left")

    async def dismiss(self, subject: Subject, by: str, reason: str) -> int:
        """Takes seat and tickets from somebody who is refused from now on, so that nothing waits for it.

        Returns:
            Number of tickets that were open.
        """
        if subject.role not in (Role.CLIENT, Role.EVALUATOR):
            return 0
        self._sessions.dismiss(subject)
        client = subject.name
        self._runs.lobby.wake(client)
        self._runs.participation.dismiss(client)
        self._runs.dismiss_evaluator(client)
        withdrawn = 0
        for engine in self._runs.active():
            if self._store.db.is_shared:
                await engine.refresh()  # another daemon may have given it a ticket
            ticket = engine.open_ticket(client)
            if ticket:
                try:
                    await engine.withdraw(ticket, reason, by)
                except TicketNotFound:  # its round has ended meanwhile
                    continue
                withdrawn += 1
        return withdrawn

    def _trusts(self, row: IdentityRow) -> bool:
        """Returns whether the authority that issued an identity's certificate is trusted, as far as that is known."""
        return not (row.issuer and self._own) or row.issuer in self._own.trusted

    def _trusted(self) -> bytes:
        """Returns what devices are to trust from now on."""
        assert self._own is not None
        return certificates.to_pem(*self._own.authorities.trusted)

    async def _authority(self) -> Authority:
        """Returns the authority that signs from now on: that of the files, which a command may just have written."""
        if self._own is None:
            raise NoAuthority("this server serves plain text and enrolls nobody; `fedpeft-server init` changes that")
        try:
            await self._take_up()
        except (IdentityInvalid, StateInvalid) as error:
            log.error("the changed certificates cannot be used", message=error.message)
            raise Unavailable(
                "the files of the server's certificates were changed and cannot be used, so it issues none for now; "
                "its log says why"
            ) from None
        if self._own.issuing is None:
            raise NoAuthority(
                "this server does not have the authority's key: ask its holder for a certificate, with "
                "spiffe://DOMAIN/fedpeft/ROLE/NAME among its subject alternative names"
            )
        return self._own.issuing

    def _issue(self, authority: Authority, subject: Subject, key: PublicKey, refused_until: float) -> x509.Certificate:
        life = self._life if subject.role in (Role.CLIENT, Role.EVALUATOR) else PERSON_LIFE
        times, now = self._issued_to[subject], time.monotonic()
        if len(times) == MOST_CERTIFICATES and now - times[0] < life.total_seconds() / 2:
            raise TooManyCertificates(
                f"{subject} was given {MOST_CERTIFICATES} certificates in {now - times[0]:.0f} s; one is good for "
                f"{life.total_seconds():.0f} s, and is renewed half-way"
            )
        times.append(now)
        after = datetime.fromtimestamp(refused_until, UTC) if math.isfinite(refused_until) else None
        return authority.issue(subject, key, life, after=after)


def _subject(role: pb.IdentityRole.ValueType, name: str) -> Subject:
    """Returns whom a request is about.

    Raises:
        SubjectInvalid: If the role is none, or the name cannot be one.
    """
    if role not in OF_PROTO:
        raise SubjectInvalid(f"the role must be one of {', '.join(Role)}", (("role", "is unspecified"),))
    try:
        return Subject(OF_PROTO[role], name)
    except IdentityInvalid as error:
        raise SubjectInvalid(error.message, (("name", "is malformed"),)) from None


def _key(signing_request: bytes) -> PublicKey:
    try:
        return requests.read(signing_request)
    except IdentityInvalid as error:
        raise SigningRequestInvalid(error.message, (("signing_request", "cannot be used"),)) from None


def _digest(key: PublicKey) -> str:
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _issued(certificate: x509.Certificate, authority: Authority) -> Issued:
    return Issued(
        time.time(),
        certificate.not_valid_after_utc.timestamp(),
        certificates.fingerprint(certificate),
        certificates.fingerprint(authority.certificate),
    )
