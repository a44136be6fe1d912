"""The certificate of a client that runs: renewed half-way through, or taken from the folder where another renews it.

An authority of the operator's own renews by its own means and replaces the file; that it did is noticed here. Either
way the channel goes on with the new one, and whatever is under way on the old connection ends there.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NoReturn

from fedpeft.errors import CertificateExpired, FedpeftError, NoAuthority
from fedpeft.identity import certificates, folder
from fedpeft.identity.folder import Identity
from fedpeft.process.logs import Log
from fedpeft.rpc import enrolment
from fedpeft_client.error_policy import NOT_LET_IN

if TYPE_CHECKING:  # it needs NumPy, of which a command that only looks at a certificate asks nothing
    from fedpeft_client.uplink.channel import Channel

SPREAD = 0.05
"""Share of the time that is left by which the moment is put off at random: a thousand sites enrolled at once."""


class Renewal:
    """Keeps an identity valid.

    Args:
        identity: Identity of this client.
        channel: Goes on with each new certificate.
        log: Log for renewals.
        now: Tells the time.
    """

    def __init__(
        self, identity: Identity, channel: Channel, log: Log, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._identity = identity
        self._channel = channel
        self._log = log
        self._now = now
        self._due = self._put_off(certificates.renewal(identity.certificate))
        self._pause_s = channel.timing.renewal_first_pause_s
        self._by_another = False

    async def run(self) -> NoReturn:
        """Renews the certificate for as long as the client runs.

        Raises:
            CertificateExpired: When the certificate has ended all the same: only a new token helps.
            FedpeftError: If the server does not let this client in any more.
        """
        while True:
            await asyncio.sleep(self._wait_s())
            if (found := await asyncio.to_thread(self._replaced)) is not None:
                self._take(found)
            check_valid(self._identity, self._now())
            if self._now() >= self._due and not self._by_another:
                await self._attempt()

    def _wait_s(self) -> float:
        end = self._identity.certificate.not_valid_after_utc
        left = (end if self._by_another else min(self._due, end)) - self._now()
        return min(max(left.total_seconds(), 0.01), self._channel.timing.renewal_check_s)

    async def _attempt(self) -> None:
        try:
            identity = await enrolment.renewed(self._identity, self._channel.renew)
        except NOT_LET_IN:
            raise
        except NoAuthority:
            self._by_another = True
            self._log.info(
                "the server issues no certificates; the authority that issued this one must replace its file in time",
                file=str(self._identity.folder / "certificate.pem"),
                until=until(self._identity),
            )
        except FedpeftError as error:
            self._log.warning(
                "certificate was not renewed; trying again", cause=str(error), until=until(self._identity)
            )
            self._due = self._now() + timedelta(seconds=self._pause_s * random.uniform(0.5, 1.0))
            self._pause_s = min(2 * self._pause_s, self._channel.timing.renewal_longest_pause_s)
        else:
            self._take(identity)

    def _replaced(self) -> Identity | None:
        """Returns the identity with a certificate that was put in the place of the one in use, if one was."""
        return folder.successor(self._identity, self._now())

    def _take(self, identity: Identity) -> None:
        self._identity = identity
        self._pause_s = self._channel.timing.renewal_first_pause_s
        end, now = identity.certificate.not_valid_after_utc, self._now()
        self._due = self._put_off(now + (end - now) / 2)
        self._channel.reopen(identity)
        self._log.info("certificate renewed", until=until(self._identity))

    def _put_off(self, due: datetime) -> datetime:
        left = self._identity.certificate.not_valid_after_utc - due
        return due + left * SPREAD * random.random()


def until(identity: Identity) -> str:
    """Returns when the certificate of an identity ends, as it stands in log lines."""
    return f"{identity.certificate.not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}"


def check_valid(identity: Identity, now: datetime) -> None:
    """Checks that the certificate of an identity is valid.

    Raises:
        CertificateExpired: If it has ended.
        IdentityInvalid: If it does not begin yet.
    """
    end = identity.certificate.not_valid_after_utc
    if now > end:
        raise CertificateExpired(
            f"the certificate of {identity.subject} ended at {end:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}; set the clock if it is ahead, or ask the operator for a new token (fedpeft token "
            f"create --name {identity.subject.name} --role {identity.subject.role}) and enroll again with --replace"
        )
    certificates.check_time(identity.certificate, now)
