"""`fedpeft-server init`: makes an authority, the server's certificate and the first operator's.

Run again, it keeps what exists and makes what is missing, so it also adds an operator, or a host to the server's
certificate.
"""

from __future__ import annotations

import argparse
import getpass
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from fedpeft import ids
from fedpeft.errors import IdentityInvalid, SettingsInvalid
from fedpeft.identity import certificates, folder, keys
from fedpeft.identity.authority import Authority, check_host
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role, Subject
from fedpeft.process import durable, flags
from fedpeft.process.addresses import Address, without_root
from fedpeft_server.access.authorities import Authorities, issued, replaced
from fedpeft_server.access.certificates import issue_server, read_authority
from fedpeft_server.access.files import Files
from fedpeft_server.commands import folder_arguments

PORT = 7070
OPERATOR_LIFE = timedelta(days=90)
LOCAL = ("localhost", "127.0.0.1", "::1")
"""Under these names the server is reached on its own machine."""


def main(arguments: list[str]) -> int:
    """Makes what is missing and says what there is.

    Raises:
        FedpeftError: What kept it from it.
    """
    given = folder_arguments.parsed(_parser(), arguments)
    files = folder_arguments.files(given)
    if (given.authority is None) != (given.authority_key is None):
        raise SettingsInvalid("--authority and --authority-key belong together: a certificate and the key to it")
    if given.port is not None and not 1 <= given.port <= 65_535:
        raise SettingsInvalid(f"--port {given.port} is not 1 to 65535")
    subject = _subject(given.operator)
    into = given.operator_identity or folder.personal_needed("--operator-identity")
    if ids.is_option(subject.name) and not folder.exists(into):
        raise SettingsInvalid(f"--operator: the name {subject.name!r} begins with a hyphen; choose another")
    check_hosts(given.host)
    with durable.refusals(f"making {files.folder}"):
        durable.make_folder(files.folder.parent, 0o700)  # the data folder: updates are private
        durable.make_folder(files.folder, 0o700)
    authority = _authority(files, given.authority, given.authority_key)
    hosts = _server(files, authority, given.host)
    server = _server_address(hosts, into, given.port, named=bool(given.host))
    _operator(files, subject, into, server, hosts)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpeft-server init",
        description="Makes what a server over TLS needs: an authority, the server's certificate, and that of the first "
        "operator. Run again, it keeps what exists, and adds hosts or an operator.",
        epilog="Example: fedpeft-server init --data-dir /var/lib/fedpeft --host fed.example.org",
    )
    folder_arguments.add(parser)
    parser.add_argument(
        "--host",
        metavar="HOST",
        type=without_root,
        action="append",
        default=[],
        help="a name or address under which clients reach the server; the first goes into tokens; may be repeated, "
        "then also *.DOMAIN; localhost is added",
    )
    parser.add_argument(
        "--port",
        metavar="PORT",
        type=int,
        help=f"the port of --listen (that in the operator's identity, else {PORT})",
    )
    parser.add_argument("--operator", metavar="NAME", default=_person(), help="the operator's name (%(default)s)")
    parser.add_argument(
        "--operator-identity",
        metavar="DIR",
        type=flags.path_or_none,
        help=f"where the operator's identity goes ({folder.personal() or 'to be named, for want of a home folder'})",
    )
    folder_arguments.add_authority(parser)
    return parser


def _person() -> str:
    """Returns what this user is called, if that can be the name of an operator."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in many containers
        name = ""
    return name if ids.CLIENT.fullmatch(name) else "operator"


def _subject(name: str) -> Subject:
    try:
        return Subject(Role.OPERATOR, name)
    except IdentityInvalid as error:
        raise SettingsInvalid(f"--operator: {error.message}") from None


def check_hosts(hosts: Sequence[str]) -> None:
    """Checks the hosts of a server's certificate, before anything is written.

    Raises:
        SettingsInvalid: If nobody can call the server by one, or the first is a pattern.
    """
    for host in hosts:
        _check(host)
    if hosts and hosts[0].startswith("*."):
        raise SettingsInvalid(
            f"--host {hosts[0]} is first, so it would go into tokens, and a pattern is no address: name the server "
            "itself before it, with another --host"
        )


def _check(host: str) -> None:
    try:
        check_host(host)
    except IdentityInvalid as error:
        raise SettingsInvalid(f"--host: {error.message}") from None
    if Address(host, PORT).is_every:
        raise SettingsInvalid(
            f"--host {host} is every address of this machine, which only --listen takes; --host is the name or address "
            "by which clients call it"
        )


def _authority(files: Files, certificate: Path | None, key: Path | None) -> Authority:
    """Returns the authority of a folder, made or taken over if there is none."""
    known = read_authority(files)
    if known is None and files.authority.exists():
        raise SettingsInvalid(
            f"{files.authority} is there without its key, so certificates come from elsewhere; give --authority and "
            "--authority-key, or name another folder"
        )
    if certificate and key:
        given = Authority(certificates.load(certificate)[0], keys.load(key))
        if known and known.certificate != given.certificate:
            raise SettingsInvalid(f"{files.folder} has another authority; name another folder with --identity")
    else:
        given = known or Authority.make("FedPEFT authority")
    if known:
        _say("authority", "kept", given.certificate, files.authority)
        return known
    with durable.refusals(f"writing {files.folder}"):
        durable.write(files.authority_key, keys.to_pem(given.key))
        durable.write(files.authority, certificates.to_pem(given.certificate))
    _say("authority", "taken over" if certificate else "made", given.certificate, files.authority)
    return given


def _server(files: Files, authority: Authority, hosts: Sequence[str]) -> list[str]:
    """Makes the server's certificate, or another one if it lacks a host or is due; returns its hosts."""
    there = certificates.load(files.server)[0] if files.exist() else None
    before = certificates.hosts_of(there) if there else []
    wanted = list(dict.fromkeys([*hosts, *before, *LOCAL]))
    lacks = set(wanted) != set(before) or wanted[0] != before[0]
    if there and not lacks and not certificates.is_due(there, datetime.now(UTC)):
        _say("server", "kept", there, files.server)
        return before
    with durable.refusals(f"writing {files.server_key}"):
        if not files.server_key.exists():
            durable.write(files.server_key, keys.to_pem(keys.make()))
    certificate = issue_server(files, authority, wanted, keys.load(files.server_key))
    _say("server", "made", certificate, files.server)
    return wanted


def _server_address(hosts: Sequence[str], into: Path, port: int | None, *, named: bool) -> Address:
    """Returns where the operator calls the server: host and port that are not given stay those of the identity.

    Args:
        hosts: Hosts of the server's certificate.
        into: The operator's identity folder.
        port: The port that was given.
        named: True if a host was given.
    """
    there = Address.parse(folder.server_of(into)) if folder.exists(into) else Address(hosts[0], PORT)
    host = there.host if there.host in hosts and not named else hosts[0]
    return Address(host, there.port if port is None else port)


def _operator(files: Files, subject: Subject, into: Path, server: Address, hosts: Sequence[str]) -> None:
    """Makes an operator's identity, unless there is one of that name and the newest authority that lasts.

    Raises:
        SettingsInvalid: If the folder holds another identity, or that of another server.
    """
    authorities = Authorities.read(files)
    authority, trusted = authorities.issuing, authorities.trusted
    assert authority is not None, "init has just read or made it"
    if folder.exists(into):
        there = Identity.load(into)
        if there.subject != subject:
            raise SettingsInvalid(
                f"{into} is the identity of {there.subject} at {there.server}; everything else was made; for {subject} "
                "another folder is needed: --operator-identity"
            )
        if not set(there.authority) & {*trusted, *replaced(files)}:
            raise SettingsInvalid(
                f"{into} is the identity of {subject} at {there.server}, of an authority that was never this server's; "
                "everything else was made; for this server another folder is needed: --operator-identity"
            )
        if Address.parse(there.server).host not in hosts:  # an authority may have several servers
            raise SettingsInvalid(
                f"{into} is the identity of {there.subject} at {there.server}, which is another server than "
                f"{server}; everything else was made; for this one another folder is needed: --operator-identity"
            )
        newest = set(there.authority) == set(trusted) and issued(authority.certificate, there.certificate)
        if there.server == str(server) and newest and not certificates.is_due(there.certificate, datetime.now(UTC)):
            _say(str(subject), "kept", there.certificate, into)
            return
    key = folder.take_key(into)
    now = datetime.now(UTC)  # of the machine that checks it, so it need not begin earlier: a revocation may be recent
    certificate = authority.issue(subject, key.public_key(), OPERATOR_LIFE, now, after=now - timedelta(seconds=1))
    folder.write(into, str(server), trusted, [certificate])
    _say(str(subject), "made", certificate, into)
    if into == folder.personal():
        print(f"this user's fedpeft command calls {server} from now on, as {subject}")


def _say(what: str, how: str, certificate: x509.Certificate, where: Path) -> None:
    end, digest = certificate.not_valid_after_utc, certificates.fingerprint(certificate)
    print(f"{what}: {how}, until {end:%Y-%m-%d}, sha256 {digest[:16]}..., {where}")
