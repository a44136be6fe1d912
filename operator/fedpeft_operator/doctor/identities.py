"""Checks that keys and certificates can be used, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from cryptography import x509

from fedpeft.identity import certificates, keys
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft_operator.doctor.findings import Finding, Setup, fault, ok, warning

SOON = timedelta(days=30)
"""An authority that ends so soon needs a successor."""
_DAY = "%Y-%m-%d %H:%M UTC"


def check_identity(setup: Setup) -> Iterator[Finding]:
    """Looks at the identity folder of a client or a person."""
    where = setup.identity_folder
    if where is None:
        if setup.state_dir is not None:
            yield ok("identity", "none; the client speaks plain text, to a server on this machine only")
        return
    identity = Identity.load(where)
    if where.stat().st_mode & 0o022:
        yield warning("identity", f"{where} can be written by others", f"chmod 700 {where}")
    now, one = datetime.now(UTC), identity.certificate
    yield _suits(setup, identity)
    if (found := _times("certificate", one, now)) is not None:
        yield found
    elif now > certificates.renewal(one) + (one.not_valid_after_utc - certificates.renewal(one)) / 2:
        yield warning(
            "certificate",
            f"ends at {one.not_valid_after_utc:{_DAY}} and was not renewed half-way",
            "run its client or command while the server is up: each renews the certificate by itself",
        )
    else:
        yield ok("certificate", f"until {one.not_valid_after_utc:{_DAY}}")
    yield from _authorities(identity.authority, now)


def _suits(setup: Setup, identity: Identity) -> Finding:
    """Returns the finding on the role, which must fit the side that is examined: a site's, or that of the commands."""
    subject, where = identity.subject, identity.folder
    takes_part = subject.role in (Role.CLIENT, Role.EVALUATOR)
    at_a_site = setup.state_dir is not None or setup.data is not None
    if takes_part and not at_a_site:
        return fault(
            "identity",
            f"{where} is the identity of {subject}, which fedpeft's commands cannot use",
            f"fedpeft-client --identity {where} uses it; for the commands enroll as an operator or a viewer "
            "(fedpeft enroll)",
        )
    if at_a_site and not takes_part:
        return fault(
            "identity",
            f"{where} is the identity of {subject}, which cannot take part in runs",
            "fedpeft-client enroll --replace, with a token of --role client or evaluator",
        )
    return ok("identity", f"{subject} for {identity.server}, in {where}")


def check_server_certificates(setup: Setup) -> Iterator[Finding]:
    """Looks at the certificates that a server shows."""
    if setup.data_dir is None:
        return
    where = setup.data_dir / "identity"
    if not (where / "server.pem").exists():
        # The server itself would not start: a folder that lost its certificate must not turn it to plain text.
        if left := [name for name in ("server.key", "authority.key", "authority.pem") if (where / name).exists()]:
            yield fault(
                "certificates",
                f"{where} has {', '.join(left)} but no server.pem",
                "restore the folder from the backup, or run fedpeft-server init again",
            )
            return
        yield ok("certificates", f"none in {where}; plain text is served, on a loopback address only")
        return
    now, one = datetime.now(UTC), certificates.load(where / "server.pem")[0]
    if keys.load(where / "server.key").public_key() != one.public_key():
        yield fault("certificates", f"{where / 'server.key'} is not the key of server.pem", "fedpeft-server init")
    elif not (hosts := certificates.hosts_of(one)):
        yield fault(
            "certificates", f"{where / 'server.pem'} is made out to no host name or address", "fedpeft-server init"
        )
    elif (found := _times("certificates", one, now)) is not None:
        yield found
    else:
        yield ok("certificates", f"for {', '.join(hosts)} until {one.not_valid_after_utc:{_DAY}}")
    if (where / "authority.key").exists():
        keys.check_private(where / "authority.key")
        yield ok("authority", "its key is here: this server enrolls and renews")
    else:
        yield ok("authority", "its key is elsewhere: certificates come from there, and nothing enrolls here")
    yield from _authorities(certificates.load(where / "authority.pem"), now)


def _authorities(chain: tuple[x509.Certificate, ...] | list[x509.Certificate], now: datetime) -> Iterator[Finding]:
    for one in chain:
        if (found := _times("authority", one, now)) is not None:
            yield found
        elif one.not_valid_after_utc - now < SOON:
            yield warning(
                "authority",
                f"ends at {one.not_valid_after_utc:{_DAY}}",
                "replace it in time, while clients stay connected: fedpeft-server authority rotate (docs/security.md)",
            )


def _times(check: str, certificate: x509.Certificate, now: datetime) -> Finding | None:
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    cures = {
        "certificate": "enroll again with a new token",
        "certificates": "fedpeft-server init, or start the server: it renews its own where the authority's key is",
        "authority": "the operator makes a new one, and everybody enrolls again",
    }
    if now > end:
        return fault(check, f"ended at {end:{_DAY}}; the clock here says {now:{_DAY}}", cures[check])
    if now < begin:
        return fault(check, f"begins at {begin:{_DAY}}; the clock here says {now:{_DAY}}", "set the clock: timedatectl")
    return None
