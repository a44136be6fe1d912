"""The versions whose files a retention removes, and how far it has decided."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.add_column("versions", sa.Column("retention", sa.String(8), nullable=False, server_default=""))
    op.create_index("ix_versions_retention_run_version", "versions", ["retention", "run", "version"])
    op.add_column("runs", sa.Column("retained_from", sa.Integer, nullable=False, server_default="1"))


def downgrade() -> None:
    op.drop_column("runs", "retained_from")
    op.drop_index("ix_versions_retention_run_version", "versions")
    op.drop_column("versions", "retention")
