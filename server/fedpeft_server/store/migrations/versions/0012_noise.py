"""The events of a round beside its record, and the name of a version's file that has noise."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    op.add_column("rounds", sa.Column("events", sa.Text, nullable=False, server_default=""))
    op.add_column("versions", sa.Column("draw", sa.String(16), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("versions", "draw")
    op.drop_column("rounds", "events")
