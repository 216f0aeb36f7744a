"""The conditions of a result: limits of its answer and class of the devices; the verdicts that a round repeated"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

COMMENT = "what its answer depends on; only results of the same are compared"
FORMER_COMMENT = "limits of its answer; only results of the same are compared"
# Before, every evaluation computed on processors.
FORMER_DEVICES = ", on cpu-process"


def upgrade() -> None:
    op.alter_column("case_result", "answer_limits", new_column_name="conditions", comment=COMMENT)
    result = sa.table("case_result", sa.column("conditions", sa.String()))
    op.execute(result.update().values(conditions=result.c.conditions + FORMER_DEVICES))
    comment = "of the champion: how many were repeated, and how many of them differed"
    op.add_column("round", sa.Column("repeated_verdicts", postgresql.JSONB(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("round", "repeated_verdicts")
    result = sa.table("case_result", sa.column("conditions", sa.String()))
    limits = sa.func.regexp_replace(result.c.conditions, ", on [^,]*$", "")
    op.execute(result.update().values(conditions=limits))
    op.alter_column("case_result", "conditions", new_column_name="answer_limits", comment=FORMER_COMMENT)
