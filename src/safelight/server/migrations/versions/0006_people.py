"""Keys of people, what each may ask for, and what each owner has asked for."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "keys",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("token", sa.String(64), nullable=False, unique=True),
        sa.Column("cookie", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.Float, nullable=False),
    )
    op.create_table(
        "allowances",
        sa.Column("key", sa.String(40), sa.ForeignKey("keys.name"), primary_key=True),
        sa.Column("kind", sa.String(16), primary_key=True),
        sa.Column("amount", sa.Float, nullable=False),
        sa.Column("period", sa.Integer, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("used", sa.Float, nullable=False),
    )
    op.add_column("jobs", sa.Column("pixel_steps", sa.Float, nullable=False, server_default="0"))
    for name in ("pictures", "pixel_steps"):
        op.add_column("shares", sa.Column(name, sa.Float, nullable=False, server_default="0"))
