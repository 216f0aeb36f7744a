"""Versions of weights that no round trained, with their provenance and smoke test"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

ROUND_COLUMNS = ("round_id", "run_id")


def upgrade() -> None:
    for column in ROUND_COLUMNS:
        op.alter_column("model_version", column, nullable=True, comment="null: weights from elsewhere")
    key_comment = "of weights from elsewhere: digest of the files, and the dtype"
    op.add_column("model_version", sa.Column("registration_key", sa.String(), nullable=True, comment=key_comment))
    op.create_unique_constraint("model_version_registration_key_key", "model_version", ["registration_key"])
    for name, comment in (
        ("provenance", "source, licence and digest of those weights"),
        ("smoke_test", "their first answer, or why there is none"),
    ):
        op.add_column("model_version", sa.Column(name, postgresql.JSONB(), nullable=True, comment=comment))


def downgrade() -> None:
    for name in ("smoke_test", "provenance", "registration_key"):
        op.drop_column("model_version", name)
    for column in ROUND_COLUMNS:  # refused while there are versions of weights from elsewhere
        op.alter_column("model_version", column, nullable=False, comment=None)
