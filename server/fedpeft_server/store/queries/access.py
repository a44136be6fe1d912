"""SQL about enrolment tokens and identities; each function is a part of the caller's transaction."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Table, and_, delete, insert, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite

from fedpeft.identity.subject import Role, Subject
from fedpeft_server.store import tables
from fedpeft_server.store.queries.collation import bytewise
from fedpeft_server.store.queries.upsert import upsert
from fedpeft_server.store.rows import IdentityRow, TokenRow


def insert_token(connection: Connection, token: TokenRow) -> None:
    """Adds a token that was not used."""
    connection.execute(
        insert(tables.tokens).values(
            secret_sha256=token.secret_sha256,
            role=token.subject.role,
            name=token.subject.name,
            created_at=token.created_at,
            created_by=token.created_by,
            expires_at=token.expires_at,
        )
    )


def select_token(connection: Connection, secret_sha256: str) -> TokenRow | None:
    """Returns the token of a secret, or None."""
    query = select(tables.tokens).where(tables.tokens.c.secret_sha256 == secret_sha256)
    row = connection.execute(query.with_for_update()).one_or_none()  # two servers may be brought it at the same time
    return None if row is None else _token(row)


def select_tokens(connection: Connection, after: tuple[float, str], most: int) -> list[TokenRow]:
    """Returns the first so many tokens after a (time of creation, digest), oldest first."""
    table = tables.tokens
    digest = bytewise(connection, table.c.secret_sha256)
    query = (
        select(table).where(tuple_(table.c.created_at, digest) > after).order_by(table.c.created_at, digest).limit(most)
    )
    return [_token(row) for row in connection.execute(query)]


def use_token(connection: Connection, secret_sha256: str, key_sha256: str, at: float) -> None:
    """Writes which key used a token."""
    table = tables.tokens
    connection.execute(
        update(table).where(table.c.secret_sha256 == secret_sha256).values(used_at=at, key_sha256=key_sha256)
    )


def delete_token(connection: Connection, id_: str) -> bool:
    """Deletes the token of an id; returns whether there was one."""
    mine = tables.tokens.c.secret_sha256.startswith(id_, autoescape=True)
    return connection.execute(delete(tables.tokens).where(mine)).rowcount > 0


def delete_tokens_of(connection: Connection, subject: Subject) -> None:
    """Deletes the tokens of a subject."""
    connection.execute(delete(tables.tokens).where(_is(tables.tokens, subject)))


def delete_tokens_until(connection: Connection, time: float) -> None:
    """Deletes the tokens that expired before a time."""
    connection.execute(delete(tables.tokens).where(tables.tokens.c.expires_at < time))


def put_certificate(
    connection: Connection, subject: Subject, issued_at: float, expires_at: float, fingerprint: str, issuer: str
) -> None:
    """Writes the newest certificate of a subject."""
    row = {
        "role": subject.role,
        "name": subject.name,
        "issued_at": issued_at,
        "expires_at": expires_at,
        "fingerprint": fingerprint,
        "issuer": issuer,
    }
    upsert(connection, tables.identities, [row], replace=("issued_at", "expires_at", "fingerprint", "issuer"))


def insert_identity(connection: Connection, subject: Subject) -> bool:
    """Adds somebody whom this server issued no certificate; returns False if another daemon did so meanwhile."""
    into = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = into(tables.identities).values(role=subject.role, name=subject.name).on_conflict_do_nothing()
    return connection.execute(statement.returning(tables.identities.c.name)).first() is not None


def put_revoked(connection: Connection, subject: Subject, at: float, reason: str) -> None:
    """Writes that a subject is refused."""
    row = {"role": subject.role, "name": subject.name, "revoked_at": at, "restored_at": None, "reason": reason}
    upsert(connection, tables.identities, [row], replace=("revoked_at", "restored_at", "reason"))


def put_restored(connection: Connection, subject: Subject, at: float) -> None:
    """Writes that a subject that was refused is not any more."""
    connection.execute(update(tables.identities).where(_is(tables.identities, subject)).values(restored_at=at))


def select_identity(connection: Connection, subject: Subject) -> IdentityRow | None:
    """Returns an identity, or None."""
    query = select(tables.identities).where(_is(tables.identities, subject))
    row = connection.execute(query).one_or_none()
    return None if row is None else _identity(row)


def select_identities(connection: Connection, after: tuple[str, str], most: int | None) -> list[IdentityRow]:
    """Returns the first so many identities after a (role, name), or all, in that order."""
    table = tables.identities
    role, name = bytewise(connection, table.c.role), bytewise(connection, table.c.name)
    query = select(table).where(tuple_(role, name) > after).order_by(role, name).limit(most)
    return [_identity(row) for row in connection.execute(query)]


def _is(table: Table, subject: Subject) -> ColumnElement[bool]:
    return and_(table.c.role == subject.role, table.c.name == subject.name)


def _subject(row: Row[Any]) -> Subject:
    return Subject(Role(row.role), row.name)


def _token(row: Row[Any]) -> TokenRow:
    return TokenRow(
        row.secret_sha256,
        _subject(row),
        row.created_at,
        row.created_by,
        row.expires_at,
        row.used_at,
        row.key_sha256,
    )


def _identity(row: Row[Any]) -> IdentityRow:
    return IdentityRow(
        _subject(row),
        row.issued_at,
        row.expires_at,
        row.fingerprint,
        row.revoked_at,
        row.reason,
        row.restored_at,
        row.issuer,
    )
