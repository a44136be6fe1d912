"""A data folder of each earlier schema, with data in it, is checked as it is, opened, and its open round goes on."""

from __future__ import annotations

import sqlite3
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from fedpeft.v1 import run_pb2
from fedpeft_server.commands import check
from fedpeft_server.store.connection import connect
from fedpeft_server.store.migrations import migrate, scripts
from fedpeft_server.timing import TIMING

from ..server.conftest import StartDaemon
from ..server.conftest import start as start
from .conftest import Golden
from .test_daemon import ARCHIVE, digest, update

SCHEMAS = sorted(script.revision for script in scripts().walk_revisions())


@pytest.fixture(scope="session")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archived data folder, its database brought to the newest schema."""
    folder = tmp_path_factory.mktemp("newest")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    engine = connect(f"sqlite:///{folder / 'data' / 'fedpeft.db'}", TIMING)
    migrate(engine)
    engine.dispose()
    return folder / "data" / "fedpeft.db"


def rewritten(folder: Path, revision: str, newest: Path) -> None:
    """Replaces the database of a data folder by one of a schema, with all of its data that this schema can hold."""
    path = folder / "fedpeft.db"
    path.unlink()
    engine, config = connect(f"sqlite:///{path}", TIMING), Config()
    config.set_main_option("script_location", "fedpeft_server.store:migrations")
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("ATTACH ? AS newest", (str(newest),))
        database.execute("PRAGMA foreign_keys = OFF")
        held = "SELECT name FROM {}.sqlite_master WHERE type = 'table' AND name NOT LIKE 'alembic%'"
        tables = {name for (name,) in database.execute(held.format("main"))}
        for table in sorted(tables & {name for (name,) in database.execute(held.format("newest"))}):
            there, known = (
                [row[1] for row in database.execute(f"PRAGMA {schema}.table_info({table})")]
                for schema in ("main", "newest")
            )
            columns = ", ".join(f'"{column}"' for column in there if column in known)
            database.execute(f'INSERT INTO main."{table}" ({columns}) SELECT {columns} FROM newest."{table}"')


@pytest.mark.parametrize("revision", SCHEMAS)
async def test_a_folder_of_each_schema_is_checked_and_its_round_goes_on(
    start: StartDaemon,
    golden: Golden,
    tmp_path: Path,
    newest: Path,
    revision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, folder = golden.kept["data folder"], tmp_path / "data"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    rewritten(folder, revision, newest)
    capsys.readouterr()
    assert check.main(["--data-dir", str(folder)]) == 0
    *notes, summary = capsys.readouterr().out.splitlines()
    assert summary.startswith("checked 2 runs, 4 versions, 0 states, 1 update, 2 records, ")
    old = [note for note in notes if f"its schema {revision} is older than {SCHEMAS[-1]}" in note]
    assert len(old) == (revision != SCHEMAS[-1])

    daemon = await start(folder)
    b = daemon.client("b")
    await b.register()
    await b.push(kept["ticket"], update(1, 1), 20)
    await daemon.until(kept["open"], lambda run: run.version == 1)
    versions = golden.kept["daemon: float32"]["versions"]
    assert [digest(await daemon.adapter(kept["finished"], version)) for version in (0, 1, 2)] == versions
    assert digest(await daemon.adapter(kept["open"], 1)) == versions[1]
    assert (await daemon.run(kept["finished"])).state == run_pb2.RUN_STATE_COMPLETED
    await daemon.end()
    capsys.readouterr()
    assert check.main(["--data-dir", str(folder)]) == 0
    assert "is older than" not in capsys.readouterr().out
