"""Items that fail alone, and records that are withdrawn"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "case",
        sa.Column("withdrawn_at", TIMESTAMP(timezone=True), nullable=True, comment="nobody stands for it any more"),
    )
    op.add_column(
        "case_result", sa.Column("reason", sa.String(), nullable=True, comment="why it could not be judged; it failed")
    )
    op.add_column(
        "round",
        sa.Column(
            "failed_items", JSONB(), server_default="{}", nullable=False, comment="items that failed alone, by step"
        ),
    )
    op.alter_column(
        "dataset",
        "state",
        comment="uploading | checked | accepted | rejected | withdrawn",
        existing_comment="uploading | checked | accepted | rejected",
    )


def downgrade() -> None:
    op.alter_column(
        "dataset",
        "state",
        comment="uploading | checked | accepted | rejected",
        existing_comment="uploading | checked | accepted | rejected | withdrawn",
    )
    op.drop_column("round", "failed_items")
    op.drop_column("case_result", "reason")
    op.drop_column("case", "withdrawn_at")
