"""When a finished job is deleted."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("expires", sa.Float))
    op.create_index("ix_jobs_expires", "jobs", ["expires"])
    op.create_index("ix_jobs_finished", "jobs", ["finished"])
