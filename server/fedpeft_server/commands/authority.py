"""`fedpeft-server authority`: shows the authority, or replaces it by another while everybody stays connected.

Between `rotate` and `finish` both authorities are trusted. Each device gets the new one as it renews its certificate,
half-way through the life of that; `show` says who has not yet, and `finish` refuses until all have, unless forced.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedpeft.errors import SettingsInvalid
from fedpeft.identity import certificates, keys
from fedpeft.identity.authority import Authority
from fedpeft.identity.subject import Role
from fedpeft.process.output import note, say, say_json
from fedpeft_server.access import authorities
from fedpeft_server.access.authorities import Authorities
from fedpeft_server.access.certificates import issue_server
from fedpeft_server.access.files import Files
from fedpeft_server.commands import folder_arguments
from fedpeft_server.store import database_url
from fedpeft_server.store.connection import connect, opening, refuse_to_forget, shown, sqlite_file
from fedpeft_server.store.database import Database
from fedpeft_server.store.migrations import schema, scripts
from fedpeft_server.store.rows import IdentityRow
from fedpeft_server.timing import TIMING

MOST_NAMED = 20
"""Names that a message lists; --json has all."""


@dataclass(frozen=True)
class Progress:
    """Identities with and without a certificate of the new authority, while the authority is being replaced.

    Attributes:
        renewed: Those who have one.
        waiting: Those whose certificate is the old authority's and still valid.
        unknown: Those to whom this server issued none: their certificates were made by `fedpeft-server init`, or
            elsewhere.
    """

    renewed: tuple[IdentityRow, ...]
    waiting: tuple[IdentityRow, ...]
    unknown: tuple[IdentityRow, ...]

    @classmethod
    def of(cls, rows: list[IdentityRow], issuer: str, now: datetime) -> Progress:
        """Sorts identities; those that were revoked, or whose certificate has ended, need nothing.

        Args:
            rows: All identities of the database.
            issuer: Fingerprint of the new authority.
            now: The time.
        """
        active = [row for row in rows if not row.is_revoked]
        valid = [row for row in active if row.expires_at is not None and row.expires_at > now.timestamp()]
        return cls(
            tuple(row for row in valid if row.issuer == issuer),
            tuple(row for row in valid if row.issuer != issuer),
            tuple(row for row in active if row.expires_at is None),
        )


def main(arguments: list[str]) -> int:
    """Shows or replaces the authority.

    Raises:
        FedpeftError: What kept it from it.
    """
    given = folder_arguments.parsed(_parser(), arguments)
    files = folder_arguments.existing(given)
    if given.command != "show":
        _identities(given.database, given.data_dir)  # before anything is changed
    if given.command == "rotate":
        _rotate(files, given.authority, given.authority_key)
    elif given.command == "finish":
        _finish(files, given)
    _show(files, _progress(files, given), _here(given), as_json=given.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-server authority",
        description="Shows the authority that signs all certificates, or replaces it: `rotate` adds the new one, which "
        "devices get as they renew; `finish` drops the old one. A running server takes both up at once.",
        epilog="Example: fedpeft-server authority rotate --data-dir /var/lib/fedpeft",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print the authority, and while it is replaced who has not renewed yet")
    rotate = commands.add_parser("rotate", help="begin to replace the authority: trust a second one beside it")
    folder_arguments.add_authority(rotate)
    finish = commands.add_parser("finish", help="drop the old authority, once everybody has renewed")
    finish.add_argument(
        "--force", action="store_true", help="also if somebody has not renewed, who must then enroll again"
    )
    for each in (show, rotate, finish):
        folder_arguments.add(each)
        each.add_argument(
            "--database",
            metavar="URL",
            default=os.environ.get("FEDPEFT_SERVER_DATABASE", ""),
            help="the server's database, if it is not SQLite in the data folder (FEDPEFT_SERVER_DATABASE)",
        )
        each.add_argument("--json", action="store_true", help="JSON in place of text")
    return parser


def _here(given: argparse.Namespace) -> str:
    """Returns the flags that the next command needs; a URL may have a password, which is not shown."""
    database = " --database URL" if given.database not in ("", os.environ.get("FEDPEFT_SERVER_DATABASE")) else ""
    return f"{folder_arguments.words(given)}{database}"


def _rotate(files: Files, certificate: Path | None, key: Path | None) -> None:
    if (certificate is None) != (key is None):
        raise SettingsInvalid("--authority and --authority-key belong together: a certificate and the key to it")
    given = Authority(certificates.load(certificate)[0], keys.load(key)) if certificate and key else None
    authorities.rotate(files, given)


def _finish(files: Files, given: argparse.Namespace) -> None:
    progress = _progress(files, given)
    if progress and progress.waiting and not given.force:
        raise SettingsInvalid(
            f"{len(progress.waiting)} have not renewed yet: {_named(progress.waiting)}; a client renews half-way "
            "through the life of its certificate while it runs, a person with fedpeft identity renew; --force drops "
            "the old authority all the same, and they must enroll again with a new token "
            "(fedpeft-client enroll --replace, fedpeft enroll --replace)"
        )
    now = Authorities.read(files)
    if now.issuing and now.is_rotating:
        issue_server(
            files, now.issuing, certificates.hosts_of(certificates.load(files.server)[0]), keys.load(files.server_key)
        )
    authorities.finish(files)
    if progress:
        for line in _locked_out(progress, folder_arguments.words(given)):
            note(line)


def _locked_out(progress: Progress, here: str) -> Iterator[str]:
    """Yields what those do whose certificates are not taken any more, or may not be."""
    people = [row for row in (*progress.waiting, *progress.unknown) if row.subject.role is Role.OPERATOR]
    if progress.waiting:
        yield (
            f"not let in any more: {_named(progress.waiting)}; each enrolls again with a new token "
            "(fedpeft-client enroll --replace, fedpeft enroll --replace)"
        )
    if progress.unknown:
        yield f"not let in any more if their certificate is of the old authority: {_named(progress.unknown)}"
    if people:
        yield f"an operator of this machine is let in again by: {_again(people, here)}"


def _again(operators: Sequence[IdentityRow], here: str) -> str:
    """Returns the command that makes the identity of an operator of this machine anew."""
    name = operators[0].subject.name if len(operators) == 1 else "NAME"
    return f"fedpeft-server init {here} --operator {name}"


def _progress(files: Files, given: argparse.Namespace) -> Progress | None:
    """Returns who has renewed; None while no authority is being replaced."""
    now = Authorities.read(files)
    if not now.is_rotating or now.issuing is None:
        return None
    issuer = certificates.fingerprint(now.issuing.certificate)
    return Progress.of(_identities(given.database, given.data_dir), issuer, datetime.now(UTC))


def _database(url: str, data_dir: Path | None) -> str | None:
    """Returns the URL of the server's database; None if no server has begun yet.

    Raises:
        SettingsInvalid: If it is not known where the database is.
    """
    if not (url or data_dir):
        raise SettingsInvalid("--data-dir is missing, or --database: who has renewed stands in the server's database")
    found = database_url(url, data_dir or Path())
    file = sqlite_file(found)
    if file is None or (file.exists() and file.stat().st_size):
        return found
    if file.exists():
        raise SettingsInvalid(f"--database {found}: it is empty; name the server's, or restore it from a backup")
    if url:
        raise SettingsInvalid(f"--database {url}: there is no such file; name the server's database")
    if data_dir is not None:
        refuse_to_forget(data_dir, url)
    if data_dir is not None and (data_dir / "spool").is_dir():
        raise SettingsInvalid(
            f"a server has worked with --data-dir {data_dir}, and its database is not there; name that with --database "
            "(or FEDPEFT_SERVER_DATABASE): who has renewed stands in it"
        )
    return None


def _identities(url: str, data_dir: Path | None) -> list[IdentityRow]:
    """Returns all identities of the database, which a running server may be using.

    Raises:
        SettingsInvalid: As `_database`.
        StateInvalid: If the URL is none, or the database cannot be read.
    """
    found = _database(url, data_dir)
    if found is None:
        return []  # nobody is enrolled
    engine = connect(found, TIMING)
    with opening(engine, TIMING):
        at, head = schema(engine), scripts().get_current_head()
        if at is None:
            raise SettingsInvalid(f"--database {shown(engine.url)}: nothing of a server is in it; name the server's")
        if at != head:
            raise SettingsInvalid(
                f"--database {shown(engine.url)} has schema {at}, and this release {head}; use the command of the "
                "server's release"
            )
    database = Database(engine, TIMING)
    try:
        return database.identities.after(("", ""))
    finally:
        database.close()


def _show(files: Files, progress: Progress | None, here: str, *, as_json: bool) -> None:
    now = Authorities.read(files)
    if as_json:
        say_json(
            {
                "authorities": [_facts(one, now) for one in now.trusted],
                "rotating": progress is not None,
                "renewed": _names(progress.renewed) if progress else [],
                "waiting": _names(progress.waiting) if progress else [],
                "unknown": _names(progress.unknown) if progress else [],
            }
        )
        return
    for one in now.trusted:
        fact = _facts(one, now)
        signs = f"signs {fact['signs']}" if fact["signs"] else "its key is not here"
        say(f"authority {str(fact['fingerprint'])[:16]}... until {one.not_valid_after_utc:%Y-%m-%d}: {signs}")
    if progress:
        for line in _lines(progress, here):
            say(line)


def _facts(one: x509.Certificate, now: Authorities) -> dict[str, object]:
    serving = now.serving is not None and now.serving.certificate == one
    issuing = now.issuing is not None and now.issuing.certificate == one
    signs = {(True, True): "all certificates", (True, False): "the server's certificate"}.get(
        (serving, issuing), "the certificates of devices and people" if issuing else ""
    )
    return {
        "fingerprint": certificates.fingerprint(one),
        "expires_at": one.not_valid_after_utc.isoformat(),
        "signs": signs,
    }


def _lines(progress: Progress, here: str) -> Iterator[str]:
    total = len(progress.renewed) + len(progress.waiting)
    yield f"{len(progress.renewed)} of {total} have renewed and trust both"
    if progress.waiting:
        last = max(row.expires_at or 0.0 for row in progress.waiting)
        yield (
            f"not yet: {_named(progress.waiting)}; the last of their certificates ends at "
            f"{datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC"
        )
    if progress.unknown:
        operators = [row for row in progress.unknown if row.subject.role is Role.OPERATOR]
        init = f"on this machine {_again(operators, here)}, elsewhere " if operators else ""
        yield (
            f"certificate not issued by the running server, so it is not known of which authority: "
            f"{_named(progress.unknown)}; {init}fedpeft identity renew"
        )
    if not progress.waiting:
        yield f"next: fedpeft-server authority finish {here}"


def _names(rows: tuple[IdentityRow, ...]) -> list[str]:
    return [str(row.subject) for row in rows]


def _named(rows: tuple[IdentityRow, ...]) -> str:
    more = f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else ""
    return ", ".join(_names(rows[:MOST_NAMED])) + more
