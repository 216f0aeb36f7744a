"""The limits of the answers that were judged, by which results are compared"""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

# Before they were stored, all answers had these.
LIMITS = "expected +128, exact +8"


def upgrade() -> None:
    comment = "limits of its answer; only results of the same are compared"
    column = sa.Column("answer_limits", sa.String(), nullable=False, server_default=LIMITS, comment=comment)
    op.add_column("case_result", column)
    op.alter_column("case_result", "answer_limits", server_default=None)


def downgrade() -> None:
    op.drop_column("case_result", "answer_limits")
