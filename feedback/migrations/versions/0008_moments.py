"""When reports and datasets were decided, which prompt a dispute is about, and one word for each split

`taught` is `train`; a round has no `policy`, which decided nothing, and a run no `state`, which nothing wrote.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

MOMENT = postgresql.TIMESTAMP(timezone=True)


def upgrade() -> None:
    op.add_column("feedback", sa.Column("reproduced_at", MOMENT, nullable=True))
    op.alter_column("feedback", "accepted_at", new_column_name="decided_at")
    op.add_column("dataset", sa.Column("decided_at", MOMENT, nullable=True))
    op.add_column("feedback", sa.Column("disputed_key", sa.String(), nullable=True))
    disputed = sa.text("state = 'disputed'")
    op.create_index("disputed_feedback", "feedback", ["disputed_key"], postgresql_where=disputed)
    for table in ("case", "dataset_row"):
        op.execute(f"UPDATE \"{table}\" SET role = 'train' WHERE role = 'taught'")
    op.alter_column("case", "role", comment="train | held_out")
    op.alter_column("dataset_row", "role", comment="train | held_out | duplicate")
    op.alter_column("outbox", "verdict", comment="fixed | still_failing | regressed | passing")
    op.execute("UPDATE round SET parameters = parameters - 'policy'")
    op.drop_column("training_run", "state")


def downgrade() -> None:
    state = sa.Column("state", sa.String(), server_default="created", nullable=False)
    op.add_column("training_run", state)
    op.alter_column("training_run", "state", server_default=None)
    op.execute('UPDATE round SET parameters = parameters || \'{"policy": "reproduced"}\'')
    for table in ("case", "dataset_row"):
        op.execute(f"UPDATE \"{table}\" SET role = 'taught' WHERE role = 'train'")
    op.alter_column("case", "role", comment="taught | held_out")
    op.alter_column("dataset_row", "role", comment="taught | held_out | duplicate")
    op.alter_column("outbox", "verdict", comment="fixed | still_failing | regressed")
    op.drop_column("dataset", "decided_at")
    op.alter_column("feedback", "decided_at", new_column_name="accepted_at")
    op.execute("UPDATE feedback SET accepted_at = NULL WHERE case_id IS NULL")
    op.drop_index("disputed_feedback", "feedback")
    op.drop_column("feedback", "disputed_key")
    op.drop_column("feedback", "reproduced_at")
