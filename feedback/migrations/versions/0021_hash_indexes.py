"""Hash indexes of the keys of rows, a quarter of the bytes of B-trees"""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

INDEXES = (
    ("ix_dataset_row_key", "dataset_row", "key"),
    ("ix_dataset_row_prompt_key", "dataset_row", "prompt_key"),
    ("ix_conversation_prompt_prompt_key", "conversation_prompt", "prompt_key"),
)


def upgrade() -> None:
    for name, table, column in INDEXES:
        op.drop_index(name, table)
        op.create_index(name, table, [column], postgresql_using="hash")


def downgrade() -> None:
    for name, table, column in INDEXES:
        op.drop_index(name, table)
        op.create_index(name, table, [column])
