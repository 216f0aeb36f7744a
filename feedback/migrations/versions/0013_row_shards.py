"""Shards of rows, which later snapshots use again, and the segments of large uploads"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "upload_segment",
        sa.Column("upload_sha256", sa.String(), nullable=False),
        sa.Column("num_segments", sa.Integer(), nullable=False, comment="of the upload"),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("start_byte", sa.BigInteger(), nullable=False),
        sa.Column("end_byte", sa.BigInteger(), nullable=False),
        sa.Column("first_line", sa.Integer(), nullable=False, comment="lines before it"),
        sa.Column(
            "first_row", sa.Integer(), nullable=False, comment="rows before it, that is lines that are not blank"
        ),
        sa.Column("end_row", sa.Integer(), nullable=False, comment="rows before its end"),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("upload_sha256", "num_segments", "number"),
    )
    op.create_table(
        "row_shard",
        sa.Column("input_digest", sa.String(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False, comment="of its uncompressed lines; its key is shards/SHA256"),
        sa.Column("num_rows", sa.Integer(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("num_stored_bytes", sa.BigInteger(), nullable=False),
        sa.Column("faults", postgresql.JSONB(), nullable=False, comment="selected rows that could not be read"),
        sa.Column("created_at", postgresql.TIMESTAMP(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.PrimaryKeyConstraint("input_digest"),
    )


def downgrade() -> None:
    """The older release reads no shards; it freezes its next mixture as one object."""
    op.drop_table("row_shard")
    op.drop_table("upload_segment")
