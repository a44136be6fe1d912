"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _runs()
    _rounds()
    _figures()
    op.create_table(
        "clients",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("instance", sa.String(32), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("capabilities", sa.LargeBinary, nullable=False),
        sa.Column("first_seen", sa.Double, nullable=False),
        sa.Column("last_seen", sa.Double, nullable=False),
        sa.Column("updates", sa.Integer, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("id", name="pk_clients"),
    )


def downgrade() -> None:
    for table in ("clients", "evaluations", "traffic", "updates", "tickets", "rounds", "versions", "runs"):
        op.drop_table(table)


def _runs() -> None:
    op.create_table(
        "runs",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("config", sa.Text, nullable=False),
        sa.Column("spec", sa.LargeBinary, nullable=False),
        sa.Column("backbone_fingerprint", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("model_parameters", sa.BigInteger, nullable=False),
        sa.Column("request_id", sa.String(256), nullable=True),
        sa.Column("request_digest", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_runs"),
        sa.UniqueConstraint("request_id", name="uq_runs_request_id"),
    )
    op.create_table(
        "versions",
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("state_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("run", "version", name="pk_versions"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_versions_runs", ondelete="CASCADE"),
    )


def _rounds() -> None:
    op.create_table(
        "rounds",
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("opened_at", sa.Double, nullable=True),
        sa.Column("deadline", sa.Double, nullable=True),
        sa.Column("extensions", sa.Integer, nullable=False),
        sa.Column("stopped", sa.Boolean, nullable=False),
        sa.Column("committed_at", sa.Double, nullable=True),
        sa.Column("record", sa.Text, nullable=False, server_default=""),
        sa.Column("record_sha256", sa.String(64), nullable=False, server_default=""),
        sa.Column("metrics", sa.JSON, nullable=False, server_default="{}"),
        sa.PrimaryKeyConstraint("run", "number", name="pk_rounds"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_rounds_runs", ondelete="CASCADE"),
    )
    op.create_table(
        "tickets",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("weight", sa.Double, nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_tickets"),
        sa.ForeignKeyConstraint(
            ["run", "number"], ["rounds.run", "rounds.number"], name="fk_tickets_rounds", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_tickets_run_number_client", "tickets", ["run", "number", "client"], unique=True)
    op.create_table(
        "updates",
        sa.Column("ticket", sa.String(64), nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("norm", sa.Double, nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("layout", sa.LargeBinary, nullable=False),
        sa.Column("payload_sha256", sa.String(64), nullable=False),
        sa.Column("received_at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("ticket", name="pk_updates"),
        sa.ForeignKeyConstraint(["ticket"], ["tickets.id"], name="fk_updates_tickets", ondelete="CASCADE"),
    )


def _figures() -> None:
    op.create_table(
        "traffic",
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("wire_up", sa.BigInteger, nullable=False),
        sa.Column("wire_down", sa.BigInteger, nullable=False),
        sa.Column("payload_up", sa.BigInteger, nullable=False),
        sa.Column("payload_down", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("run", "number", "client", name="pk_traffic"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_traffic_runs", ondelete="CASCADE"),
    )
    op.create_table(
        "evaluations",
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("evaluator", sa.String(64), nullable=False),
        sa.Column("split", sa.String(64), nullable=False),
        sa.Column("metrics", sa.JSON, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("run", "version", "evaluator", "split", name="pk_evaluations"),
        sa.ForeignKeyConstraint(
            ["run", "version"], ["versions.run", "versions.version"], name="fk_evaluations_versions", ondelete="CASCADE"
        ),
    )
