"""How many bytes of an uploaded file are stored"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "none of a file that was refused when it came"
    op.add_column("dataset", sa.Column("num_stored_bytes", sa.BigInteger(), nullable=True, comment=comment))
    op.execute("update dataset set num_stored_bytes = num_bytes")  # until now refused files were stored as well
    op.alter_column("dataset", "num_stored_bytes", nullable=False)


def downgrade() -> None:
    op.drop_column("dataset", "num_stored_bytes")
