"""Checkpoints that the object store keeps for later rounds, and what each training run started from"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

TIME = postgresql.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.create_table(
        "training_state",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=True, comment="of the kept checkpoint; none if nothing was kept"),
        sa.Column("manifest_sha256", sa.String(), nullable=True),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("has_moments", sa.Boolean(), nullable=False),
        sa.Column("end_reason", sa.String(), nullable=True, comment="why nothing is kept any more"),
        sa.Column("ended_at", TIME, nullable=True),
        sa.Column("cleared_at", TIME, nullable=True, comment="since then the store has nothing else of the run"),
        sa.Column("created_at", TIME, server_default=sa.func.now(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["training_run.id"]),
        sa.PrimaryKeyConstraint("run_id"),
    )
    comment = "weights or masters from which training started"
    op.add_column("training_run", sa.Column("started_from", sa.String(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("training_run", "started_from")
    op.drop_table("training_state")
