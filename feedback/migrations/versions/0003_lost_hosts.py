"""The machine of a lost device, as a batch system names it"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "device", sa.Column("lost_host", sa.String(), nullable=True, comment="the machine, as a batch system names it")
    )


def downgrade() -> None:
    op.drop_column("device", "lost_host")
