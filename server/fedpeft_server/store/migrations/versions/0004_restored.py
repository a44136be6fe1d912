"""A revoked name is refused until it is restored, not until its next certificate."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("identities", sa.Column("restored_at", sa.Double, nullable=True))
    # Who was enrolled again after a revocation is let in as it was: with certificates that begin after the revocation.
    op.execute("UPDATE identities SET restored_at = revoked_at WHERE issued_at > revoked_at")


def downgrade() -> None:
    op.drop_column("identities", "restored_at")
