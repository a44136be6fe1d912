"""The splits of a run, and the last figures of each, are found without reading every evaluation."""

from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_index("ix_evaluations_run_split_at", "evaluations", ["run", "split", "at"])


def downgrade() -> None:
    op.drop_index("ix_evaluations_run_split_at", "evaluations")
