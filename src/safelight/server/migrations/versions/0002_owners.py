"""The owner of a job, how often its worker was killed from outside, and whose folder this is."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("owner", sa.String(64)))
    op.create_index("ix_jobs_owner", "jobs", ["owner"])
    op.add_column("jobs", sa.Column("kills", sa.Integer, nullable=False, server_default="0"))
    # Before, all who knew the one token were one owner.
    op.execute("UPDATE jobs SET owner = 'default'")
    op.create_table(
        "facts",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
