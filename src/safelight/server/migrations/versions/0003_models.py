"""The model that draws a job, and the model that an owner chose."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("model", sa.Text))
    op.create_table(
        "choices",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("model", sa.Text, nullable=False),
    )
