"""The authority that issued the newest certificate of an identity, to see who has not renewed while it is replaced."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("identities", sa.Column("issuer", sa.String(64), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("identities", "issuer")
