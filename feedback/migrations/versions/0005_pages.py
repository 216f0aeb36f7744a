"""Lists in pages: an index in the order of each"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ORDERS = {
    "feedback": ("feedback_in_order", ["contributor_id", "created_at", "id"]),
    "dataset": ("datasets_in_order", ["contributor_id", "created_at", "id"]),
    "outbox": ("notices_in_order", ["contributor_id", "id"]),
}


def upgrade() -> None:
    for table, (name, columns) in ORDERS.items():
        op.create_index(name, table, columns)
        op.drop_index(f"ix_{table}_contributor_id", table)


def downgrade() -> None:
    for table, (name, _) in ORDERS.items():
        op.create_index(f"ix_{table}_contributor_id", table, ["contributor_id"])
        op.drop_index(name, table)
