"""What a server has lost since it lived last, as it sees at its start.

A backup that was put back in part must not make another server of it: one that serves plain text where it demanded
certificates, for example.
"""

from __future__ import annotations

from pathlib import Path

from fedpeft.errors import SettingsInvalid
from fedpeft_server.store.database import Database


def refuse_lost_certificates(database: Database, folder: Path) -> None:
    """Refuses to serve plain text where certificates were in use; for a server that has none.

    Args:
        database: What knows who called with one, and who was to get one.
        folder: Where the server looked for its own.

    Raises:
        SettingsInvalid: If they were.
    """
    holder = _holder(database)
    if holder:
        raise SettingsInvalid(
            f"the database knows {holder}, and there is no server.pem in {folder}; restore that folder from the "
            "backup, name it with --identity, or make another with `fedpeft-server init`, with which everybody "
            "enrolls anew; --insecure says that plain text is meant"
        )


def _holder(database: Database) -> str:
    """Returns somebody who has a certificate, or was to get one; empty if nobody is known."""
    for row in database.identities.after(("", "")):
        # Names are refused in plain text, too: then nothing else is known of them.
        if row.fingerprint or row.revoked_at is None:
            return f"{row.subject}, who came with a certificate"
    tokens = database.identities.tokens_after((0.0, ""), 1)
    return f"an enrolment token for {tokens[0].subject}" if tokens else ""
