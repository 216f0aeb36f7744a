"""The devices of the model server: reserved ones, and leases that share a device with it"""

import sqlalchemy as sa
from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    shares: sa.Column[bool] = sa.Column(
        "shares_devices",
        sa.Boolean(),
        nullable=False,
        server_default=sa.false(),
        comment="the model server and one other lease may hold the same device if both share",
    )
    op.add_column("lease", shares)
    is_reserved: sa.Column[bool] = sa.Column(
        "is_reserved", sa.Boolean(), nullable=False, server_default=sa.false(), comment="for the model server alone"
    )
    op.add_column("device", is_reserved)


def downgrade() -> None:
    op.drop_column("device", "is_reserved")
    op.drop_column("lease", "shares_devices")
