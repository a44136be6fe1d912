"""Diagnosis of a server that cannot be reached, in one sentence that says what to do.

A connection that gRPC could not make is made once more, by Python's own TLS, which says which step fails: the name, the
port, the protocol, the authority, the clock, the name in the certificate, the version, and last whether the server
takes this side's certificate. Blocking, and bounded by `BUDGET_S`; `explain` does it beside an event loop.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedpeft.errors import IdentityInvalid
from fedpeft.identity import certificates, folder
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft.rpc.probe import ConnectionProbe, Fault, PermanentFault, SpeaksTls

BUDGET_S = 5.0
"""Longest that the search for a cause takes."""

_MOMENT = "%Y-%m-%d %H:%M UTC"
_OUT_OF_TIME = frozenset({9, 10})
"""OpenSSL's codes for a certificate that is not valid yet, or not any more."""
_UNKNOWN_ISSUER = frozenset({2, 7, 18, 19, 20, 21, 30})
"""OpenSSL's codes for a chain that does not end at, or was not signed by, what is trusted."""


@dataclass(frozen=True)
class Trust:
    """With what a connection is tried.

    Attributes:
        authority: The certificates that are trusted.
        folder: The identity folder with the own certificate and key; None where none is shown.
        own: The own certificate; None likewise.
    """

    authority: tuple[x509.Certificate, ...]
    folder: Path | None = None
    own: x509.Certificate | None = None

    @classmethod
    def of(cls, identity: Identity) -> Trust:
        """Returns the trust of an identity."""
        return cls(identity.authority, identity.folder, identity.certificate)


async def explain(server: str, trust: Trust | None) -> Fault | None:
    """Looks for the cause beside the event loop; see `diagnose`."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Fault | None] = loop.create_future()

    def work() -> None:
        found = diagnose(server, trust)
        with suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(_settle, answer, found)

    # Not the loop's own executor, which is waited for at the end: looking a name up cannot be interrupted.
    threading.Thread(target=work, name="diagnosis", daemon=True).start()
    try:
        async with asyncio.timeout(BUDGET_S):
            return await answer
    except TimeoutError:
        return Fault(
            f"{server} cannot be reached, and the cause was not found in time: check this machine's name service"
        )


def _settle(answer: asyncio.Future[Fault | None], found: Fault | None) -> None:
    if not answer.done():
        answer.set_result(found)


def diagnose(server: str, trust: Trust | None) -> Fault | None:
    """Returns the cause of a failed connection to a server.

    Args:
        server: HOST:PORT.
        trust: With what TLS is tried; None for plain text.

    Returns:
        A fault, whose text is the sentence; None if a connection is made without fault, now at least.
    """
    probe = ConnectionProbe(server, time.monotonic() + BUDGET_S, secured=trust is not None)
    try:
        if trust is None:
            _plain(probe)
        else:
            _tls(probe, trust)
    except Fault as fault:
        return fault
    except OSError as error:
        return Fault(f"the connection to {server} broke ({error.strerror or error}): something between closes it")
    except ValueError as error:  # a certificate is read piece by piece
        return PermanentFault(f"the certificate of {server} cannot be read ({error}): have its operator make another")
    return None


def _plain(probe: ConnectionProbe) -> None:
    first = probe.first_bytes()
    if first[:2] == b"\x15\x03" or (not first and probe.peer_certificate()):
        raise SpeaksTls(
            f"the server at {probe.server} speaks TLS and this side has no certificate: ask its operator for a token "
            "and enroll, or name the folder of its identity with --identity (the identity of this user is used "
            "unnamed only for the HOST:PORT that stands in it)"
        )
    probe.judge(first)


def _tls(probe: ConnectionProbe, trust: Trust) -> None:
    """Makes a TLS connection as gRPC would, and waits for the server's first word on it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=certificates.to_pem(*trust.authority).decode())
    with closing(probe.connect()) as line:
        if trust.folder is not None:
            _show(context, trust.folder)
        try:
            secure = context.wrap_socket(line, server_hostname=probe.address.host)
        except ssl.SSLCertVerificationError as error:
            raise _unproven(probe, error, trust) from None
        except TimeoutError:
            raise probe.silent("does not answer the TLS handshake") from None
        except (ssl.SSLError, ConnectionError) as error:
            raise _no_handshake(probe, getattr(error, "reason", None) or "", trust) from None
    with closing(secure):
        _first_word(probe, secure, trust)


def _show(context: ssl.SSLContext, identity: Path) -> None:
    """Has the own certificate shown; its files may have changed since they were read."""
    try:
        context.load_cert_chain(folder.certificate_path(identity), folder.key_path(identity), password=bytes)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", "") or error
        raise PermanentFault(
            f"the key and certificate in {identity} cannot be used any more ({why}): put them back, or enroll "
            "again with a new token"
        ) from None


def _no_handshake(probe: ConnectionProbe, reason: str, trust: Trust) -> Fault:
    """Returns why TLS did not come about for a reason other than the server's certificate."""
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return PermanentFault(
            f"{probe.server} offers only TLS 1.2 or older, and FedPEFT speaks TLS 1.3: a proxy between them "
            "intercepts TLS, perhaps; let it pass the port through as plain TCP"
        )
    if "ALERT" in reason:
        return PermanentFault(f"{probe.server} refuses the TLS handshake: {reason.lower().replace('_', ' ')}")
    try:
        probe.judge(probe.first_bytes())
    except Fault as fault:
        return fault
    where = f", in {trust.folder}" if trust.folder else ""
    return PermanentFault(
        f"the server at {probe.server} serves plain text, and this side has a certificate for TLS{where}: name the "
        "port with TLS, or have the server set up with `fedpeft-server init`; to go without the certificate, say "
        "fedpeft --insecure, or give a client another --state-dir"
    )


def _unproven(probe: ConnectionProbe, error: ssl.SSLCertVerificationError, trust: Trust) -> PermanentFault:
    """Returns why the server's certificate does not prove that it is the one wanted."""
    shown = probe.peer_certificate()
    if error.verify_code in _OUT_OF_TIME and (fault := _out_of_time(probe.server, shown, trust)):
        return fault
    if shown is not None and "match" in error.verify_message:
        return PermanentFault(
            f"the certificate of {probe.server} is not made out to {probe.address.host!r} but to {_names(shown)}: use "
            "one of these names, or have the server's certificate made with this one (`fedpeft-server init --host`)"
        )
    if error.verify_code in _UNKNOWN_ISSUER:
        return _unknown_issuer(probe.server, shown, trust)
    return PermanentFault(f"the certificate of {probe.server} cannot be trusted: {error.verify_message}")


def _unknown_issuer(server: str, shown: x509.Certificate | None, trust: Trust) -> PermanentFault:
    """Returns what to do about a certificate of an authority that is not trusted.

    An authority that is replaced keeps its name, as a rule, and a proxy has another; neither is proved by a name.
    """
    issuer = shown.issuer.rfc4514_string() if shown else ""  # it is shown on a connection of its own, which may fail
    names = list(dict.fromkeys(one.subject.rfc4514_string() for one in trust.authority))
    replaced = f"the server's authority was replaced since: {_new_token(trust)}"
    elsewhere = "a proxy between them that intercepts TLS, or another federation's server: check the address"
    if issuer in names:
        return PermanentFault(
            f"{server} shows a certificate of {issuer!r} with another key than the authority of that name which this "
            f"side trusts. Most likely {replaced}. If its operator knows nothing of that, it is {elsewhere}"
        )
    whose = repr(issuer) if issuer else "an authority that is not trusted here"
    return PermanentFault(
        f"{server} shows a certificate of {whose}, and this side trusts {', '.join(names)!r}: {elsewhere}. Or "
        f"{replaced}"
    )


def _new_token(trust: Trust) -> str:
    """Returns how this side comes to trust the authority that a server has by now."""
    if trust.own is None:
        return "ask its operator for a new token (fedpeft token create), for this one is worthless"
    try:
        subject = certificates.subject(trust.own)
    except IdentityInvalid:
        return "have the new authority issue another certificate"
    if subject.role in (Role.CLIENT, Role.EVALUATOR):
        return "ask its operator for a new token, then fedpeft-client enroll --replace TOKEN"
    again = "ask another operator for a new token, then fedpeft enroll --replace TOKEN"
    if subject.role is Role.OPERATOR:
        return f"on the server's own machine fedpeft-server init --data-dir DIR --operator {subject.name}; else {again}"
    return again


def _out_of_time(server: str, shown: x509.Certificate | None, trust: Trust) -> PermanentFault | None:
    """Returns whose time is over or has not come: the server's certificate's, or its authority's."""
    now = datetime.now(UTC)
    whose, cure = f"the certificate of {server}", "have its operator renew it"
    for one in (shown, *trust.authority):
        if one is not None and now > one.not_valid_after_utc:
            return PermanentFault(
                f"{whose} ended at {one.not_valid_after_utc:{_MOMENT}}, and this machine's clock says {now:{_MOMENT}}: "
                f"{cure}, or set the clock here if it is that"
            )
        if one is not None and now < one.not_valid_before_utc:
            return _early(whose, one, now)
        whose, cure = f"the authority of {server}", "its operator must make a new one, and everybody enroll"
    return None


def _first_word(probe: ConnectionProbe, secure: ssl.SSLSocket, trust: Trust) -> None:
    """Waits for the server's first word: in TLS 1.3 it refuses a certificate after this side is through."""
    if secure.selected_alpn_protocol() != "h2":
        raise PermanentFault(
            f"what answers at {probe.server} speaks TLS but not gRPC: check the port, or let the proxy between pass "
            "HTTP/2 through"
        )
    try:
        secure.settimeout(probe.step_s())
        first = secure.recv(16)
    except TimeoutError:
        raise probe.silent("completes the TLS handshake but sends nothing") from None
    except (ssl.SSLError, ConnectionError):  # an alert says no more: gRPC's servers close the line without one
        first = b""
    if not first:
        raise _refused(probe.server, trust)


def _refused(server: str, trust: Trust) -> PermanentFault:
    """Returns why the server does not take this side's certificate."""
    own = trust.own
    if own is None:
        return PermanentFault(
            f"{server} wants a certificate and this side has none yet: it is not the port where devices enroll"
        )
    now, end = datetime.now(UTC), own.not_valid_after_utc
    if now > end:
        return PermanentFault(
            f"the certificate here ended at {end:{_MOMENT}}, and this machine's clock says {now:{_MOMENT}}: ask the "
            "operator for a new token and enroll again"
        )
    if now < own.not_valid_before_utc:
        return _early("the certificate here", own, now)
    return PermanentFault(
        f"{server} does not take the certificate here, which {own.issuer.rfc4514_string()} issued until "
        f"{end:{_MOMENT}}: the server trusts another authority, since its own was replaced perhaps, or its clock is "
        f"wrong. If the authority was replaced, {_new_token(trust)}"
    )


def _early(whose: str, certificate: x509.Certificate, now: datetime) -> PermanentFault:
    return PermanentFault(
        f"{whose} begins at {certificate.not_valid_before_utc:{_MOMENT}}, but this machine's clock says "
        f"{now:{_MOMENT}}: the clock is behind; set it (timedatectl)"
    )


def _names(certificate: x509.Certificate) -> str:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return "no name at all"
    names = [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]
    return ", ".join(names[:20]) or "no host name at all"
