"""Clients' use of their last tickets of a run, so that those who do not deliver are sampled last."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

NAMES = ("missed", "missed_in", "refused")


def upgrade() -> None:
    for name in NAMES:
        op.add_column("answers", sa.Column(name, sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    for name in NAMES:
        op.drop_column("answers", name)
