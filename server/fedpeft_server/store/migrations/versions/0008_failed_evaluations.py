"""A version that an evaluator cannot score is written down, so that it gets the others."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "failed_evaluations",
        sa.Column("evaluator", sa.String(64), primary_key=True),
        sa.Column("run", sa.String(64), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(
            ["run", "version"],
            ["versions.run", "versions.version"],
            ondelete="CASCADE",
            name="fk_failed_evaluations_versions",
        ),
        sa.PrimaryKeyConstraint("evaluator", "run", "version", name="pk_failed_evaluations"),
    )


def downgrade() -> None:
    op.drop_table("failed_evaluations")
