"""How often the whole server ended while a job was drawn."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("ends", sa.Integer, nullable=False, server_default="0"))
