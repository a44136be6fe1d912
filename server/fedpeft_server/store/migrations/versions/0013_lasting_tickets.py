"""The round that a ticket is in, which may be a later one than gave it out, and when it was given out."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    op.add_column("tickets", sa.Column("counts_in", sa.Integer, nullable=False, server_default="0"))
    op.add_column("tickets", sa.Column("issued_at", sa.Double, nullable=True))
    op.execute("UPDATE tickets SET counts_in = number")
    op.create_index("ix_tickets_run_counts_in_client", "tickets", ["run", "counts_in", "client"])


def downgrade() -> None:
    op.drop_index("ix_tickets_run_counts_in_client", "tickets")
    op.drop_column("tickets", "issued_at")
    op.drop_column("tickets", "counts_in")
