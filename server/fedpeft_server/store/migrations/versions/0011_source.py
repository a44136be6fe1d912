"""The source of a version that a rollback made: its file has a name of its own, which no fold writes."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("versions", sa.Column("source", sa.Integer, nullable=True))


def downgrade() -> None:
    op.drop_column("versions", "source")
