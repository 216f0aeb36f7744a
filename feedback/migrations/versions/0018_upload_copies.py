"""The moment since which the checked file of an upload may be stored; snapshots of more than 2,147,483,647 rows"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "since then its file may be under uploads/SHA256"
    moment = postgresql.TIMESTAMP(timezone=True)
    op.add_column("dataset_upload", sa.Column("copy_began_at", moment, nullable=True, comment=comment))
    op.alter_column("snapshot", "num_rows", type_=sa.BigInteger(), existing_type=sa.Integer())


def downgrade() -> None:
    op.alter_column("snapshot", "num_rows", type_=sa.Integer(), existing_type=sa.BigInteger())
    op.drop_column("dataset_upload", "copy_began_at")
