"""The activity of each round's present step, and the counts of the windows that it trains on; older rounds have none"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "progress of the present step, in one line"
    op.add_column("round", sa.Column("activity", sa.String(), nullable=True, comment=comment))
    comment = "of the windows trained on, by part"
    op.add_column("round", sa.Column("token_counts", postgresql.JSONB(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("round", "token_counts")
    op.drop_column("round", "activity")
