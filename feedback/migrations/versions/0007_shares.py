"""What one account may take from others: rows that held-out cases close out, and how they are counted"""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "of the newest mixture, by held-out cases"
    column = sa.Column("num_closed_out", sa.Integer(), server_default="0", nullable=False, comment=comment)
    op.add_column("dataset", column)
    op.alter_column("dataset", "num_closed_out", server_default=None)
    op.create_index("ix_dataset_row_prompt_key", "dataset_row", ["prompt_key"])
    op.create_index("held_out_rows", "dataset_row", ["dataset_id"], postgresql_where=sa.text("role = 'held_out'"))


def downgrade() -> None:
    op.drop_index("held_out_rows", "dataset_row")
    op.drop_index("ix_dataset_row_prompt_key", "dataset_row")
    op.drop_column("dataset", "num_closed_out")
