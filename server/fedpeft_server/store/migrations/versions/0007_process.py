"""The process of a client that registered last, so that a copy of its state that was left behind is found out."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("clients", sa.Column("process", sa.String(32), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("clients", "process")
