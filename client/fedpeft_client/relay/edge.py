"""The edge's server, as a relay calls it, and which of its errors are worth another call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from fedpeft.api.operator_client import ATTEMPTS, OperatorClient
from fedpeft.errors import (
    DiskFull,
    FedpeftError,
    IdentityInvalid,
    LocalError,
    PermissionDenied,
    RunNotFound,
    ServerUnreachable,
    TrainingFailed,
    Unauthenticated,
    Unavailable,
)
from fedpeft.identity import certificates
from fedpeft.identity.folder import Identity
from fedpeft.process.logs import Log
from fedpeft.rpc import diagnosis
from fedpeft.rpc.probe import SpeaksTls
from fedpeft_client.relay.options import RelayOptions
from fedpeft_client.relay.rules import POLICY
from fedpeft_client.timing import TIMING, Timing

AWAY = (DiskFull, Unavailable)
"""Errors of a server that is away, or cannot do its work for now."""


class Edge:
    """The edge's server.

    Args:
        options: Its address, and as whom it is called.
        timing: The client's.
    """

    def __init__(self, options: RelayOptions, timing: Timing = TIMING) -> None:
        self.timing = timing
        self._options = options

    @asynccontextmanager
    async def connected(self, *, attempts: int = ATTEMPTS) -> AsyncIterator[OperatorClient]:
        """Opens a connection, for which the certificate is read anew, and renewed past half of its life.

        Args:
            attempts: Times that a call is made before an unavailable server is given up.

        Raises:
            IdentityInvalid: If the identity cannot be used or has ended, or if the server does not let this relay in:
                what only a person can change.
        """
        server = self._options.server
        identity = None
        if self._options.identity is not None:
            identity = Identity.load(self._options.identity)
            certificates.check_time(identity.certificate, datetime.now(UTC))
        try:
            async with OperatorClient(server, identity, setting="--relay", attempts=attempts) as called:
                yield called
        except (PermissionDenied, Unauthenticated) as error:
            raise IdentityInvalid(
                f"the edge's server {server} does not let this relay in: {error.message}; --relay-identity names the "
                "identity of an operator of it"
            ) from None
        except ServerUnreachable:
            if identity is None and isinstance(await diagnosis.explain(server, None), SpeaksTls):
                raise IdentityInvalid(
                    f"the edge's server {server} speaks TLS, and lets in whom it knows; name the folder with the "
                    "identity of an operator of it with --relay-identity"
                ) from None
            raise

    async def look(self, log: Log) -> None:
        """Asks whether the server is there and lets this relay in; one that does not answer is logged, for it may yet.

        Raises:
            IdentityInvalid: As `connected`.
        """
        server = self._options.server
        try:
            async with self._looking() as called:
                await called.check()
            log.info("the edge's server answers", server=server)
        except LocalError:
            raise
        except FedpeftError as error:
            log.warning("the edge's server does not answer as it should", server=server, cause=str(error))

    async def makes_versions_of(self, run: str, log: Log) -> bool:
        """Returns True if a parent's run is the server's own: it is that parent; False if it does not answer."""
        try:
            async with self._looking() as called:
                found, _ = await called.run(run)
        except RunNotFound:
            return False
        except FedpeftError as error:
            log.warning("the edge's server does not answer as it should", server=self._options.server, cause=str(error))
            return False
        return found.config.rounds.policy != POLICY

    @asynccontextmanager
    async def _looking(self) -> AsyncIterator[OperatorClient]:
        """Opens a connection for calls on which nothing depends: they are made once, and not waited for long."""
        async with self.connected(attempts=1) as server:
            server.timeout_s = self.timing.relay_look_s
            yield server


def private(error: FedpeftError, log: Log) -> TrainingFailed:
    """Returns what the parent's server is told of an error of the edge's; all of it is logged here.

    The sentence of an error may name the edge's clients, addresses and files.
    """
    log.error("the edge's server could not be worked with", reason=error.reason, cause=str(error))
    whose = "its agent" if isinstance(error, LocalError) else "its server"
    return TrainingFailed(
        f"the edge has no sum: {whose} fails with {error.reason}; the log of the edge's agent says why"
    )
