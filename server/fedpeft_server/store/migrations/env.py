"""Alembic's entry: runs the steps on the connection that `migrate` holds, inside its transaction."""

from alembic import context

from fedpeft_server.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
    # SQLite too can undo DDL, because the connection makes real transactions (`connection.py`).
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
