"""Enrolment tokens, and whoever was enrolled or revoked; every method is one transaction, as in `Database`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sqlalchemy import Connection

from fedpeft import ids
from fedpeft.errors import (
    IdentityNotFound,
    NameInUse,
    SubjectInvalid,
    TokenExpired,
    TokenNotFound,
    TokenUnknown,
    TokenUsed,
)
from fedpeft.identity.audit import Detail
from fedpeft.identity.subject import Role, Subject
from fedpeft_server.store.notices.notices import Topic
from fedpeft_server.store.queries import access
from fedpeft_server.store.rows import SERVER, AuditEvent, IdentityRow, TokenRow
from fedpeft_server.store.transactions import Transactions

_SHARED_IDS = {Role.CLIENT: Role.EVALUATOR, Role.EVALUATOR: Role.CLIENT}
"""Roles whose names are ids of clients, and which other role's are too."""


Issue = Callable[[Subject, float], "Issued"]


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was issued.

    Attributes:
        at: Time of issue.
        expires_at: Its end.
        fingerprint: SHA-256, hexadecimal.
        issuer: Fingerprint of the authority that issued it.
    """

    at: float
    expires_at: float
    fingerprint: str
    issuer: str

    @property
    def details(self) -> dict[str, Detail]:
        """Its entry in the audit log."""
        return {"fingerprint": self.fingerprint, "expires_at": self.expires_at}


class Identities:
    """The part of the database that says who may speak."""

    def __init__(self, transactions: Transactions) -> None:
        self._transactions = transactions

    def add_token(self, token: TokenRow) -> None:
        """Adds an enrolment token.

        Raises:
            NameInUse: If the name is enrolled in a role that shares ids with the token's.
            SubjectInvalid: If the name is new and begins with a hyphen.
        """
        audit_event = AuditEvent(token.created_by, "token.created", str(token.subject), {"token": token.id})
        with self._transactions.begin(audit_event) as connection:
            _refuse_shared_id(connection, token.subject)
            _refuse_new_option(connection, token.subject)
            access.insert_token(connection, token)

    def tokens_after(self, after: tuple[float, str], most: int) -> list[TokenRow]:
        """Returns the first so many tokens after a (time of creation, digest), oldest first."""
        with self._transactions.read() as connection:
            return access.select_tokens(connection, after, most)

    def delete_token(self, token_id: str, actor: str) -> None:
        """Deletes a token.

        Raises:
            TokenNotFound: If there is none of that id.
        """
        with self._transactions.begin(AuditEvent(actor, "token.deleted", token_id)) as connection:
            if not access.delete_token(connection, token_id):
                raise TokenNotFound(f"there is no enrolment token {token_id!r}")

    def purge_tokens(self, before: float) -> None:
        """Deletes the tokens that expired before a time; they have been worthless since."""
        with self._transactions.begin() as connection:
            access.delete_tokens_until(connection, before)

    def enroll(self, secret_sha256: str, key_sha256: str, now: float, issue: Issue) -> tuple[TokenRow, IdentityRow]:
        """Uses a token; with the key that used it first as often as asked for. A revoked subject is admitted again.

        Args:
            secret_sha256: Digest of the secret that was brought.
            key_sha256: Digest of the public key that asks.
            now: Seconds since the epoch.
            issue: Makes the certificate for the token's subject, to begin after the given time, if it is finite: those
                that begin before are refused.

        Returns:
            The token, and whom it enrolled.

        Raises:
            TokenUnknown: If no token has the secret.
            TokenExpired: If it is too old.
            TokenUsed: If another key used it.
            NameInUse: As `add_token`; another token may have been used meanwhile.
        """
        with self._transactions.begin() as connection:
            token = access.select_token(connection, secret_sha256)
            if token is None:
                raise TokenUnknown("the enrolment token is not known here: it was deleted, or is another server's")
            _check(token, key_sha256, now)
            _refuse_shared_id(connection, token.subject)
            known = access.select_identity(connection, token.subject) or IdentityRow(token.subject)
            if known.is_revoked:  # its older tokens were deleted then: an operator wants it back
                access.put_restored(connection, token.subject, now)
                known = replace(known, restored_at=now)
            issued = issue(token.subject, known.refused_until)
            access.use_token(connection, secret_sha256, key_sha256, token.used_at or now)
            self._tell(connection, token.subject)
            _put_certificate(connection, token.subject, issued)
            who = str(token.subject)
            self._transactions.append(
                connection, AuditEvent(who, "identity.enrolled", who, {"token": token.id, **issued.details})
            )
        return token, known

    def renewed(self, subject: Subject, issued: Issued) -> None:
        """Writes that a subject has another certificate."""
        audit_event = AuditEvent(str(subject), "identity.renewed", str(subject), issued.details)
        with self._transactions.begin(audit_event) as connection:
            _put_certificate(connection, subject, issued)

    def seen(self, subject: Subject) -> None:
        """Writes that somebody called, unless it is in the database: then this server did not enroll it.

        Raises:
            NameInUse: As `add_token`; another authority may give a name in both roles.
        """
        with self._transactions.begin() as connection:
            if access.select_identity(connection, subject) is None:
                _refuse_shared_id(connection, subject)
                if access.insert_identity(connection, subject):
                    self._transactions.append(connection, AuditEvent(SERVER, "identity.seen", str(subject)))

    def revoke(
        self, subject: Subject, at: float, reason: str, actor: str, *, unseen: bool = False, left: bool = False
    ) -> IdentityRow:
        """Refuses a subject, and makes its tokens worthless.

        Args:
            subject: Subject that is revoked.
            at: Time of the revocation.
            reason: Reason for it.
            actor: Identity of the caller.
            unseen: True to revoke also if nobody of that role and name called or was enrolled.
            left: True if the subject itself wants it.

        Raises:
            IdentityNotFound: If nobody did or was, and that is not meant.
        """
        action = "identity.left" if left else "identity.revoked"
        audit_event = AuditEvent(actor, action, str(subject), {"reason": reason})
        with self._transactions.begin(audit_event) as connection:
            known = access.select_identity(connection, subject)
            if not unseen and known is None:
                raise _nobody(connection, subject)
            access.delete_tokens_of(connection, subject)
            if known is None or not known.is_revoked:  # the first time and reason count, however often it is repeated
                access.put_revoked(connection, subject, at, reason)
            found = access.select_identity(connection, subject)
            self._tell(connection, subject)
        assert found is not None
        return found

    def restore(self, subject: Subject, at: float, actor: str) -> IdentityRow:
        """Lets a subject that was revoked in again, with certificates that begin after `at`; others as they are.

        Raises:
            IdentityNotFound: If nobody of that role and name called, was enrolled or revoked.
            NameInUse: As `add_token`; another may have taken the name meanwhile.
        """
        with self._transactions.begin() as connection:
            found = access.select_identity(connection, subject)
            if found is None:
                raise IdentityNotFound(f"nobody of role and name {subject} has called, was enrolled or was revoked")
            if found.is_revoked:
                _refuse_shared_id(connection, subject)
                access.put_restored(connection, subject, at)
                self._tell(connection, subject)
                self._transactions.append(connection, AuditEvent(actor, "identity.restored", str(subject)))
                found = replace(found, restored_at=at)
        return found

    def of(self, subject: Subject) -> IdentityRow | None:
        """Returns an identity; None if nobody of that role and name has called, was enrolled or was revoked."""
        with self._transactions.read() as connection:
            return access.select_identity(connection, subject)

    def _tell(self, connection: Connection, subject: Subject) -> None:
        self._transactions.notices.tell(connection, Topic.IDENTITY, [(subject.role, subject.name)])

    def after(self, after: tuple[str, str], most: int | None = None) -> list[IdentityRow]:
        """Returns the first so many identities after a (role, name), or all, in that order."""
        with self._transactions.read() as connection:
            return access.select_identities(connection, after, most)


def _put_certificate(connection: Connection, subject: Subject, issued: Issued) -> None:
    access.put_certificate(connection, subject, issued.at, issued.expires_at, issued.fingerprint, issued.issuer)


def _check(token: TokenRow, key_sha256: str, now: float) -> None:
    if now > token.expires_at:
        raise TokenExpired("the enrolment token has expired; ask the operator for another")
    if token.key_sha256 not in ("", key_sha256):
        raise TokenUsed(
            "the enrolment token was used by another key; ask for another, and if nobody here used it have "
            f"{token.subject} revoked"
        )


def _nobody(connection: Connection, subject: Subject) -> IdentityNotFound:
    others = [Subject(role, subject.name) for role in Role if role is not subject.role]
    if known := [str(other) for other in others if access.select_identity(connection, other)]:
        remedy = f"there is {' and '.join(known)}: name that role"
    else:
        remedy = "check both"
    return IdentityNotFound(
        f"nobody was enrolled as {subject}, and nobody of that role and name has called with a certificate (calls in "
        f"plain text have none); {remedy}, or set `unseen` to refuse it before it is enrolled or calls"
    )


def _refuse_new_option(connection: Connection, subject: Subject) -> None:
    """Refuses a new name that commands take for an option; one that was enrolled before may be enrolled again.

    Raises:
        SubjectInvalid: If it is one.
    """
    if ids.is_option(subject.name) and access.select_identity(connection, subject) is None:
        raise SubjectInvalid(
            f"the name {subject.name!r} begins with a hyphen, so commands take it for an option; choose another",
            (("name", "begins with a hyphen"),),
        )


def _refuse_shared_id(connection: Connection, subject: Subject) -> None:
    """Refuses a name that is an evaluator's for a client, and the other way round.

    Raises:
        NameInUse: If it is one, and not revoked.
    """
    other = _SHARED_IDS.get(subject.role)
    found = other and access.select_identity(connection, Subject(other, subject.name))
    if found and not found.is_revoked:
        raise NameInUse(
            f"{subject.name} is enrolled as {other}, and the name is its client id; choose another name, or revoke it "
            f"as {other} first"
        )
