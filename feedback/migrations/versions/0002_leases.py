"""Device pools and leases"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "device_pool",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("launcher", sa.String(), nullable=False, comment="local | slurm | kubernetes"),
        sa.Column("created_at", TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_table(
        "device",
        sa.Column("pool", sa.String(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("device_class", sa.String(), nullable=False),
        sa.Column("node", sa.String(), nullable=False),
        sa.Column("lost_reason", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["pool"], ["device_pool.name"]),
        sa.PrimaryKeyConstraint("pool", "id"),
    )
    op.create_table(
        "lease",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("pool", sa.String(), nullable=False),
        sa.Column("wanted", JSONB(), nullable=False, comment="devices of each class"),
        sa.Column("devices", JSONB(none_as_null=True), nullable=True),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("team", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("ttl_s", sa.Float(), nullable=False),
        sa.Column("asked_at", TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("granted_at", TIMESTAMP(timezone=True), nullable=True),
        sa.Column(
            "heartbeat_at", TIMESTAMP(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("fenced_at", TIMESTAMP(timezone=True), nullable=True),
        sa.Column("released_at", TIMESTAMP(timezone=True), nullable=True),
        sa.Column("end_reason", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["pool"], ["device_pool.name"]),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("open_leases", "lease", ["pool"], postgresql_where=sa.text("released_at is null"))
    op.create_index(op.f("ix_lease_pool"), "lease", ["pool"])
    op.create_index(op.f("ix_lease_run_id"), "lease", ["run_id"])
