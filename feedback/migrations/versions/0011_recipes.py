"""The recipe of each round, as it was when the round began; older rounds have none"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    comment = "name and values of the recipe, with replaced values"
    op.add_column("round", sa.Column("recipe", postgresql.JSONB(), nullable=True, comment=comment))


def downgrade() -> None:
    op.drop_column("round", "recipe")
