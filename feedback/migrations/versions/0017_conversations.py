"""The prompts of conversations, with which held-out prompts are compared"""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "conversation_prompt",
        sa.Column("dataset_id", sa.String(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("prompt_key", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["dataset_id", "number"], ["dataset_row.dataset_id", "dataset_row.number"]),
        sa.PrimaryKeyConstraint("dataset_id", "number", "prompt_key"),
    )
    op.create_index(op.f("ix_conversation_prompt_prompt_key"), "conversation_prompt", ["prompt_key"], unique=False)


def downgrade() -> None:
    op.drop_table("conversation_prompt")
