"""The schema, step by step; run by the server as it starts.

A new step: change `tables.py`, add a file to `versions/` whose `down_revision` is the newest, run the store's tests.
"""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Engine, text

from fedpeft.errors import StateInvalid
from fedpeft_server.store.connection import reading
from fedpeft_server.store.postgresql import unlimited


def migrate(engine: Engine) -> None:
    """Brings a database to the newest schema, in one transaction.

    Raises:
        StateInvalid: If the schema is newer than this code.
    """
    config = _config()
    steps = ScriptDirectory.from_config(config)
    if schema(engine) == steps.get_current_head():  # read, which a program that holds a lock does not keep it from
        return
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":  # several daemons may start at once
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('fedpeft'), hashtext(current_schema()))"))
        current = MigrationContext.configure(connection).get_current_revision()
        if current is not None and not _known(steps, current):
            raise StateInvalid(
                f"the database has schema {current}, which this server (schema {steps.get_current_head()}) "
                "does not know; upgrade the server to the version that wrote it"
            )
        if connection.dialect.name == "postgresql":
            unlimited(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def schema(engine: Engine) -> str | None:
    """Returns the step of the schema that a database is at; None if nothing of a server is in it."""
    with reading(engine) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def scripts() -> ScriptDirectory:
    """Returns the steps of the schema."""
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", "fedpeft_server.store:migrations")
    config.set_main_option("path_separator", "os")
    return config


def _known(steps: ScriptDirectory, revision: str) -> bool:
    try:
        return steps.get_revision(revision) is not None
    except CommandError:
        return False
