"""An index that finds the oldest job of a model."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.create_index("ix_jobs_model", "jobs", ["status", "owner", "model", "created"])
