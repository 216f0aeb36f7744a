"""By which rule the keys of rows and cases were computed; a round recomputes those of an older rule"""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table, comment in (
        ("dataset", "version of the rule of its rows' keys"),
        ("case", "version of the rule of its keys"),
    ):
        column = sa.Column("key_rule", sa.Integer(), server_default="1", nullable=False, comment=comment)
        op.add_column(table, column)
        op.alter_column(table, "key_rule", server_default=None)


def downgrade() -> None:
    for table in ("dataset", "case"):
        op.drop_column(table, "key_rule")
