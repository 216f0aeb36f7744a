"""Columns of a lease named by what they hold: the requested device counts, and when they were requested"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NEW_NAMES = {"wanted": "device_counts", "asked_at": "requested_at"}


def upgrade() -> None:
    for old_name, new_name in NEW_NAMES.items():
        op.alter_column("lease", old_name, new_column_name=new_name)


def downgrade() -> None:
    for old_name, new_name in NEW_NAMES.items():
        op.alter_column("lease", new_name, new_column_name=old_name)
