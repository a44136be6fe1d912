"""Checks at a server's start for what was lost since it last ran.

A backup that was put back in part must not make another server of it: one that serves plain text where it demanded
certificates, for example.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from fedpeft.errors import DiskFull, FedpeftError, SettingsInvalid
from fedpeft.rounds.transitions import ACTIVE
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.database import Database
from fedpeft_server.store.rows import VersionRow
from fedpeft_server.store.store import Store, version_files

log = structlog.get_logger()


def refuse_lost_certificates(database: Database, folder: Path) -> None:
    """Refuses to serve plain text where certificates were in use; for a server that has none.

    Args:
        database: Database, which knows the callers with a certificate and those who were to get one.
        folder: Folder in which the server looked for its own.

    Raises:
        SettingsInvalid: If they were.
    """
    holder = _holder(database)
    if holder:
        raise SettingsInvalid(
            f"the database knows {holder}, and there is no server.pem in {folder}; restore that folder from the "
            "backup, name it with --identity, or make another with `fedpeft-server init`, after which everybody "
            "enrolls anew; use --insecure if plain text is meant"
        )


async def refuse_unwritable_stores(store: Store, timeout_s: float) -> None:
    """Tries to write to each place that a flag names; what may only be away for now is logged.

    Args:
        store: Of the server.
        timeout_s: Time in which an object store must answer, seconds.

    Raises:
        SettingsInvalid: If a folder refuses.
    """
    await asyncio.gather(*(_try(store, place, timeout_s) for place in store.places))


async def _try(store: Store, place: Blobs, timeout_s: float) -> None:
    said = "a store cannot be written; uploads that need it wait until it can"
    try:
        async with asyncio.timeout(None if place.is_folder else timeout_s):
            await store.version(place.try_writing)
    except TimeoutError:
        log.warning(said, store=place.name, message=f"no answer in {timeout_s:g} seconds")
    except DiskFull as error:  # as after the start: room may come
        log.warning(said, store=place.name, message=error.message)
    except FedpeftError as error:
        if place.is_folder:
            raise SettingsInvalid(f"{error.message}, or name another folder") from None
        log.warning(said, store=place.name, message=error.message)


async def tell_lost_versions(store: Store, timeout_s: float) -> None:
    """Logs what runs need and the blobs have not, and versions of runs that a new database cannot know.

    Before any run is taken up, for runs make versions; it keeps no server from its other runs.

    Args:
        store: Of the server.
        timeout_s: Time in which an object store must say what it has, seconds.
    """
    new, needed = await store.transact(_expected, store.db)
    try:
        async with asyncio.timeout(timeout_s):
            for version in needed:
                if missing := await store.compute(_missing, store.blobs, version):
                    said = "adapter versions that the next round needs are lost; restore the blobs from the backup"
                    log.error(said, run=version.run, missing=missing)
            if new and await store.compute(store.blobs.has_any, "runs"):
                log.warning(
                    "the database is new, and there are adapter versions of runs that it does not know; if they are "
                    "this server's, restore the database from the backup or name it with --database"
                )
    except TimeoutError:
        log.error("could not check whether adapter versions are lost", message=f"no answer in {timeout_s:g} seconds")
    except FedpeftError as error:
        log.error("could not check whether adapter versions are lost", message=error.message)


def _expected(database: Database) -> tuple[bool, list[VersionRow]]:
    """Returns whether no server has lived with a database, and the versions that rounds go on from."""
    runs = database.runs()
    new = not runs and not database.transactions.entries_after(0, 1)
    return new, [database.version(run.id, run.version) for run in runs if run.state in ACTIVE]


def _missing(blobs: Blobs, version: VersionRow) -> list[str]:
    """Returns the keys of a version that nothing is under."""
    return [file.key for file in version_files(version) if not blobs.has(file.key)]


def _holder(database: Database) -> str:
    """Returns somebody who has a certificate, or was to get one; empty if nobody is known."""
    for row in database.identities.after(("", "")):
        # Names are refused in plain text, too: then nothing else is known of them.
        if row.fingerprint or row.revoked_at is None:
            return f"{row.subject}, who came with a certificate"
    tokens = database.identities.tokens_after((0.0, ""), 1)
    return f"an enrolment token for {tokens[0].subject}" if tokens else ""
