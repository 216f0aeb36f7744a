"""The rows that the check of a dataset has staged for its acceptance"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "shard of its rows as a round stages them"
    op.add_column("dataset_upload", sa.Column("staged_rows", postgresql.JSONB(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("dataset_upload", "staged_rows")
