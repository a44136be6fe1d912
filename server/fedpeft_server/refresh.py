"""Refresh: the server's certificate is renewed in time, and what a command wrote into its files is taken up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from fedpeft.identity import certificates
from fedpeft_server.access.certificates import ServerCertificates
from fedpeft_server.metrics import Metrics
from fedpeft_server.store.store import Store

log = structlog.get_logger()


class CertificateRefresh:
    """Keeps the server's certificates those of their files.

    Args:
        own: The server's certificates; None if it has none, and then nothing is done.
        store: Has threads for work on files.
        metrics: Metrics that show their end.
        replaced: Called after they were replaced.
    """

    def __init__(
        self, own: ServerCertificates | None, store: Store, metrics: Metrics, replaced: Callable[[], None]
    ) -> None:
        self._own = own
        self._store = store
        self._metrics = metrics
        self._replaced = replaced
        self._refreshing = asyncio.Lock()

    async def refresh(self) -> None:
        """Renews the server's certificate in time, or takes up what others wrote, and shows when it ends."""
        if (own := self._own) is None:
            return
        try:
            async with self._refreshing:
                replaced = await self._store.file(own.refresh)
            if replaced:
                self._replaced()
                log.info(
                    "server certificates replaced",
                    ends=str(own.certificate.not_valid_after_utc),
                    authorities=[certificates.fingerprint(one)[:16] for one in own.authorities.trusted],
                )
        finally:
            self._metrics.certificate_expires("server", own.certificate.not_valid_after_utc.timestamp())
            self._metrics.certificate_expires("authority", own.root.not_valid_after_utc.timestamp())

    async def take_up(self) -> None:
        """Takes up what a command wrote since the files were read."""
        if self._own is not None and await self._store.file(self._own.changed):
            await self.refresh()
