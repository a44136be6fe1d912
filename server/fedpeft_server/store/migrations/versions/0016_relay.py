"""The client of a parent's server for which a run is relayed."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.add_column("runs", sa.Column("relay", sa.String(64), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("runs", "relay")
