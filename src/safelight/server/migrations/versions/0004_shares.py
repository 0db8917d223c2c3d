"""The turns of owners in the queue, and indexes that find the next of a million jobs at once."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.execute("UPDATE jobs SET owner = '' WHERE owner IS NULL")
    op.create_index("ix_jobs_shortest", "jobs", ["status", "owner", "cost", "created"])
    op.create_index("ix_jobs_oldest", "jobs", ["status", "owner", "created", "cost"])
    op.create_table(
        "shares",
        sa.Column("owner", sa.String(64), primary_key=True),
        sa.Column("began", sa.Float, nullable=False),
        sa.Column("ended", sa.Float, nullable=False),
    )
    op.execute("INSERT INTO shares SELECT DISTINCT owner, 0.0, 0.0 FROM jobs")
