"""Clients' answers to the offer of a run."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "answers",
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("client", sa.String(64), nullable=False),
        sa.Column("accepted", sa.Boolean, nullable=False),
        sa.Column("reasons", sa.JSON, nullable=False),
        sa.Column("examples", sa.BigInteger, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.PrimaryKeyConstraint("run", "client", name="pk_answers"),
        sa.ForeignKeyConstraint(["run"], ["runs.id"], name="fk_answers_runs", ondelete="CASCADE"),
    )


def downgrade() -> None:
    op.drop_table("answers")
