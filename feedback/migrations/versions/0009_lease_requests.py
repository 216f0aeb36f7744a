"""Columns of a lease named by what they hold, and the comments that other columns have in `feedback.tables`"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NEW_NAMES = {"wanted": "device_counts", "asked_at": "requested_at"}
# Comments, old and new, by table and column.
COMMENTS = {
    ("case", "withdrawn_at"): ("nobody stands for it any more", "since then no report or dataset has it"),
    ("dataset", "state"): (
        "uploading | checked | accepted | rejected | withdrawn",
        "checked | accepted | rejected | withdrawn",
    ),
    ("dataset", "decided_at"): (None, "accepted or rejected"),
    ("feedback", "decided_at"): (None, "accepted, rejected or disputed, the last time"),
    ("feedback", "disputed_key"): (None, "while disputed: the prompt key of the other's case"),
}


def upgrade() -> None:
    for (table, column), (_, comment) in COMMENTS.items():
        op.alter_column(table, column, comment=comment)
    for old_name, new_name in NEW_NAMES.items():
        op.alter_column("lease", old_name, new_column_name=new_name)


def downgrade() -> None:
    for (table, column), (comment, _) in COMMENTS.items():
        op.alter_column(table, column, comment=comment)
    for old_name, new_name in NEW_NAMES.items():
        op.alter_column("lease", new_name, new_column_name=old_name)
