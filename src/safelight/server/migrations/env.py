"""Run migrations on the connection that `schema.py` opened."""

from alembic import context

from safelight.server.tables import meta

context.configure(connection=context.config.attributes["connection"], target_metadata=meta)
with context.begin_transaction():
    context.run_migrations()
