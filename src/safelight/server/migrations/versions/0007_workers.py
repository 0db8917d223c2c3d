"""The roster of workers that join from elsewhere."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "workers",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("place", sa.String(255), nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("memory", sa.Integer),
        sa.Column("joined", sa.Float, nullable=False),
        sa.Column("seen", sa.Float, nullable=False, index=True),
    )
