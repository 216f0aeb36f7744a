"""Uploads of datasets in parts: the state of each, until its parts are deleted"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

OLD_STATES = "checked | accepted | rejected | withdrawn"


def upgrade() -> None:
    moment = postgresql.TIMESTAMP(timezone=True)
    op.create_table(
        "dataset_upload",
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("part_bytes", sa.BigInteger(), nullable=False, comment="of every part but the last"),
        sa.Column("store_upload", sa.String(), nullable=True, comment="id of the store's multipart upload"),
        sa.Column(
            "active_at",
            moment,
            server_default=sa.text("now()"),
            nullable=False,
            comment="when its owner last sent a request",
        ),
        sa.Column("num_received_bytes", sa.BigInteger(), nullable=False, comment="as the store last listed them"),
        sa.Column("received_at", moment, nullable=True, comment="complete"),
        sa.Column("num_checks", sa.Integer(), nullable=False, comment="how often its check began"),
        sa.Column("num_checked_bytes", sa.BigInteger(), nullable=False),
        sa.Column("checked_at", moment, nullable=True),
        sa.Column("released_at", moment, nullable=True, comment="when its parts or its unchecked file were deleted"),
        sa.ForeignKeyConstraint(["dataset_id"], ["dataset.id"]),
        sa.PrimaryKeyConstraint("dataset_id"),
    )
    op.create_index("open_uploads", "dataset_upload", ["dataset_id"], postgresql_where=sa.text("released_at is null"))
    op.alter_column("dataset", "state", comment=f"uploading | checking | {OLD_STATES}", existing_comment=OLD_STATES)


def downgrade() -> None:
    """Uploads that are not complete are withdrawn: the older release has no state for them."""
    op.execute(
        "update dataset set state = 'withdrawn', num_stored_bytes = 0, reason = 'an older release was installed' where state in ('uploading', 'checking')"
    )
    op.alter_column("dataset", "state", comment=OLD_STATES)
    op.drop_table("dataset_upload")
