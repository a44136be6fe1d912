"""`fedpeft-server certificate`: shows the server's certificate, or makes another one, for other hosts if need be.

The daemon need not be stopped: it takes the new certificate up at once, and no connection is lost.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime

from fedpeft.errors import SettingsInvalid
from fedpeft.identity import certificates, keys
from fedpeft.process.addresses import without_root
from fedpeft.process.output import note, say, say_json
from fedpeft_server.access.authorities import Authorities
from fedpeft_server.access.certificates import issue_server
from fedpeft_server.access.files import Files
from fedpeft_server.commands import folder_arguments
from fedpeft_server.commands.init import LOCAL, check_hosts


def main(arguments: list[str]) -> int:
    """Shows or renews the server's certificate.

    Raises:
        FedpeftError: What kept it from it.
    """
    given = folder_arguments.parsed(_parser(), arguments)
    files = folder_arguments.existing(given)
    if given.command == "renew":
        _renew(files, given.host)
    _show(files, as_json=given.json)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-server certificate",
        description="Shows the server's certificate, or makes another one. A running server takes it up at once; "
        "connections go on.",
        epilog="Example: fedpeft-server certificate renew --data-dir /var/lib/fedpeft --host fed.example.org",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    show = commands.add_parser("show", help="print hosts, end and fingerprint")
    renew = commands.add_parser("renew", help="make another certificate, with the same hosts or others")
    renew.add_argument(
        "--host",
        metavar="HOST",
        type=without_root,
        action="append",
        default=[],
        help="a name or address under which clients reach the server, in place of those in the certificate now; the "
        "first goes into tokens; may be repeated, then also *.DOMAIN; localhost is added",
    )
    for each in (show, renew):
        folder_arguments.add(each)
        each.add_argument("--json", action="store_true", help="JSON in place of text")
    return parser


def _renew(files: Files, hosts: list[str]) -> None:
    check_hosts(hosts)
    authority = Authorities.read(files).serving
    if authority is None:
        raise SettingsInvalid(
            f"{files.folder} has no authority.key: have the authority that issued server.pem issue another one, and "
            "put it in its place; the server takes it up at once"
        )
    before = certificates.hosts_of(certificates.load(files.server)[0])
    wanted = list(dict.fromkeys([*hosts, *LOCAL])) if hosts else before
    issue_server(files, authority, wanted, keys.load(files.server_key))
    if dropped := [host for host in before if host not in wanted]:
        note(
            f"hosts no longer in it: {', '.join(dropped)}; devices whose identity.toml names one of them cannot "
            "connect any more"
        )


def _show(files: Files, *, as_json: bool) -> None:
    one = certificates.load(files.server)[0]
    end, digest = one.not_valid_after_utc, certificates.fingerprint(one)
    if as_json:
        say_json(
            {
                "hosts": certificates.hosts_of(one),
                "expires_at": end.isoformat(),
                "fingerprint": digest,
                "file": str(files.server),
            }
        )
        return
    say(f"hosts        {', '.join(certificates.hosts_of(one))}")
    say(f"ends         {end:%Y-%m-%d %H:%M} UTC{' (it has ended)' if end < datetime.now(UTC) else ''}")
    say(f"fingerprint  {digest}")
    say(f"file         {files.server}")
