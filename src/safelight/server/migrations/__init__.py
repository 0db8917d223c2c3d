"""Alembic's scripts for the database of jobs; `schema.py` runs them."""
