"""The tables. The migrations make them; a test holds both equal.

Times are seconds since the epoch, digests hexadecimal. What a foreign key points to takes its dependants with it.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)


def _run_key(*, primary: bool = True) -> Column[str]:
    return Column("run", String(64), ForeignKey("runs.id", ondelete="CASCADE"), primary_key=primary)


runs = Table(
    "runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("config", Text, nullable=False),
    Column("spec", LargeBinary, nullable=False),
    Column("backbone_fingerprint", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("model_parameters", BigInteger, nullable=False),
    # Null where the caller gave none: any number of those may exist, but only one run a request.
    Column("request_id", String(256), nullable=True, unique=True),
    Column("request_digest", String(64), nullable=False),
    # Number of transitions so far; each is written only where it is the one that it began at.
    Column("revision", BigInteger, nullable=False, server_default="0"),
    # The first version on which no retention has decided yet.
    Column("retained_from", Integer, nullable=False, server_default="1"),
    # The client of the parent's server for which the run is relayed; empty for all others.
    Column("relay", String(64), nullable=False, server_default=""),
)

# The daemon that folds the rounds of a run, until a time on the database's clock; whoever takes it raises the epoch.
leases = Table(
    "leases",
    metadata,
    _run_key(),
    Column("holder", String(16), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("expires_at", Double, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    _run_key(),
    Column("version", Integer, primary_key=True),
    Column("sha256", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("state_sha256", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    # The earlier version that a rollback made it of. Null where it was folded, and in rows that older servers wrote.
    Column("source", Integer, nullable=True),
    # Names the file of a fold that drew noise, or of the first version of a relayed run, which two callers may create
    # at the same time; empty where the same bytes are made every time.
    Column("draw", String(16), nullable=False, server_default=""),
    # `rows.FileState`; empty where nothing was decided, or the version is kept.
    Column("retention", String(8), nullable=False, server_default=""),
    Index("ix_versions_retention_run_version", "retention", "run", "version"),
)

rounds = Table(
    "rounds",
    metadata,
    _run_key(),
    Column("number", Integer, primary_key=True),
    Column("phase", String(16), nullable=False),
    Column("opened_at", Double, nullable=True),
    Column("deadline", Double, nullable=True),
    Column("extensions", Integer, nullable=False),
    Column("stopped", Boolean, nullable=False),
    Column("committed_at", Double, nullable=True),
    Column("record", Text, nullable=False, server_default=""),
    Column("record_sha256", String(64), nullable=False, server_default=""),
    Column("metrics", JSON, nullable=False, server_default="{}"),
    # Of the record, as JSON, so that an accountant need not read all records; empty if there are none.
    Column("events", Text, nullable=False, server_default=""),
)

tickets = Table(
    "tickets",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("run", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("client", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("weight", Double, nullable=True),
    # `number` is that of the round that gave it out; this one of the round that it is in: a later one in buffered runs.
    Column("counts_in", Integer, nullable=False, server_default="0"),
    # Null in rows that older servers wrote.
    Column("issued_at", Double, nullable=True),
    ForeignKeyConstraint(["run", "number"], ["rounds.run", "rounds.number"], ondelete="CASCADE"),
    Index("ix_tickets_run_number_client", "run", "number", "client", unique=True),
    Index("ix_tickets_run_counts_in_client", "run", "counts_in", "client"),
)

updates = Table(
    "updates",
    metadata,
    Column("ticket", String(64), ForeignKey("tickets.id", ondelete="CASCADE"), primary_key=True),
    Column("examples", BigInteger, nullable=False),
    Column("norm", Double, nullable=False),
    Column("metrics", JSON, nullable=False),
    # The manifest, its digest apart: dense updates of a run share the rest, so that it is decoded once for all.
    Column("layout", LargeBinary, nullable=False),
    Column("payload_sha256", String(64), nullable=False),
    Column("received_at", Double, nullable=False),
)

# The round of a byte need not be in `rounds`: a trainer may pull version 0 before any round is held.
traffic = Table(
    "traffic",
    metadata,
    _run_key(),
    Column("number", Integer, primary_key=True),
    Column("client", String(64), primary_key=True),
    Column("wire_up", BigInteger, nullable=False),
    Column("wire_down", BigInteger, nullable=False),
    Column("payload_up", BigInteger, nullable=False),
    Column("payload_down", BigInteger, nullable=False),
)

evaluations = Table(
    "evaluations",
    metadata,
    Column("run", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("evaluator", String(64), primary_key=True),
    Column("split", String(64), primary_key=True),
    Column("metrics", JSON, nullable=False),
    Column("at", Double, nullable=False),
    ForeignKeyConstraint(["run", "version"], ["versions.run", "versions.version"], ondelete="CASCADE"),
    Index("ix_evaluations_run_split_at", "run", "split", "at"),
)

failed_evaluations = Table(
    "failed_evaluations",
    metadata,
    Column("evaluator", String(64), primary_key=True),
    Column("run", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("at", Double, nullable=False),
    ForeignKeyConstraint(["run", "version"], ["versions.run", "versions.version"], ondelete="CASCADE"),
)

# A client need not have a row of its own: what it answered is worth keeping for as long as the run.
answers = Table(
    "answers",
    metadata,
    _run_key(),
    Column("client", String(64), primary_key=True),
    Column("accepted", Boolean, nullable=False),
    Column("reasons", JSON, nullable=False),
    Column("examples", BigInteger, nullable=False),
    Column("at", Double, nullable=False),
    # How the client used its last tickets of the run: `fedpeft.rounds.conduct`.
    Column("missed", Integer, nullable=False, server_default="0"),
    Column("missed_in", Integer, nullable=False, server_default="0"),
    Column("refused", Integer, nullable=False, server_default="0"),
)

clients = Table(
    "clients",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("instance", String(32), nullable=False),
    Column("role", String(16), nullable=False),
    Column("capabilities", LargeBinary, nullable=False),
    Column("first_seen", Double, nullable=False),
    Column("last_seen", Double, nullable=False),
    Column("updates", Integer, nullable=False, server_default="0"),
    # The process that registered last; empty if it did not say.
    Column("process", String(32), nullable=False, server_default=""),
)

# The secret itself is nowhere: it has 32 random bytes, so its digest cannot be turned back.
tokens = Table(
    "tokens",
    metadata,
    Column("secret_sha256", String(64), primary_key=True),
    Column("role", String(16), nullable=False),
    Column("name", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("used_at", Double, nullable=True),
    # Of the public key that used it, empty before: the same key may ask again, for an answer may be lost.
    Column("key_sha256", String(64), nullable=False, server_default=""),
)

# Whoever called or was enrolled. What is known of certificates is that of the newest one that this server issued.
identities = Table(
    "identities",
    metadata,
    Column("role", String(16), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("issued_at", Double, nullable=True),
    Column("expires_at", Double, nullable=True),
    Column("fingerprint", String(64), nullable=False, server_default=""),
    # While the second is null, whatever the subject brings is refused; then certificates that begin before the second.
    Column("revoked_at", Double, nullable=True),
    Column("restored_at", Double, nullable=True),
    Column("reason", Text, nullable=False, server_default=""),
    Column("issuer", String(64), nullable=False, server_default=""),
)

# Rows are added, never changed; `fedpeft.identity.audit` says what each digest is of.
audit = Table(
    "audit",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", String(256), nullable=False),
    Column("action", String(256), nullable=False),
    Column("object", String(256), nullable=False),
    Column("details", Text, nullable=False),
    Column("previous_sha256", String(64), nullable=False),
    Column("sha256", String(64), nullable=False),
)
