"""Values of the global flags, for every command; and access to the parts that only some installations have."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from fedpeft.api.caller import Caller, choose
from fedpeft.api.caller import parsed as address
from fedpeft.errors import LocalError
from fedpeft.process import output

if TYPE_CHECKING:
    from fedpeft.api.operator_client import OperatorClient

T = TypeVar("T")


@dataclass
class Session:
    """The global flags; the one object that all commands share.

    Attributes:
        asked: HOST:PORT of the server, if it was named.
        identity: The identity folder, if it was named.
        insecure: True if plain text may leave this machine.
        verbose: True to show the traceback of an error.
        identity_named: True if the identity folder stood on the command line, and not in the environment alone.
    """

    asked: str | None = None
    identity: Path | None = None
    insecure: bool = False
    verbose: bool = False
    identity_named: bool = False
    _warned: bool = False

    @property
    def server(self) -> str:
        """HOST:PORT of the server.

        Raises:
            SettingsInvalid: As `client`.
            IdentityInvalid: As `client`.
        """
        return self._caller().server

    def client(self) -> OperatorClient:
        """Returns a client of the server; enter it with `async with`.

        Raises:
            SettingsInvalid: If the address is not HOST:PORT, or plain text would leave this machine unasked.
            IdentityInvalid: If the identity cannot be used.
        """
        from fedpeft.rpc import grpc_core

        grpc_core.configure()
        from fedpeft.api.operator_client import OperatorClient

        caller = self._caller()
        if caller.identity is None and not self._warned and not address(caller.server).is_loopback:
            self._warned = True
            output.note(f"fedpeft: plain text: anyone on the path to {caller.server} can read and change what is sent")
        return OperatorClient(
            caller.server, caller.identity, say=lambda text: output.note(f"fedpeft: {caller.server}: {text}")
        )

    @property
    def secured(self) -> bool:
        """True if the server is called with a certificate.

        Raises:
            SettingsInvalid: As `client`.
            IdentityInvalid: As `client`.
        """
        return self._caller().identity is not None

    @property
    def may_write(self) -> bool:
        """True if the server lets this identity change anything; plain text may.

        Raises:
            SettingsInvalid: As `client`.
            IdentityInvalid: As `client`.
        """
        identity = self._caller().identity
        return identity is None or identity.subject.role == "operator"

    def _caller(self) -> Caller:
        return choose(self.asked, self.identity, insecure=self.insecure)


def session_of(context: typer.Context) -> Session:
    """Returns the session of a command."""
    return context.ensure_object(Session)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's asynchronous part to its end."""
    return asyncio.run(work)


def require(extra: str, *modules: str) -> None:
    """Checks that an optional part of the installation is there, without loading it.

    Its log lines go to standard error: standard output carries results.

    Raises:
        LocalError: With the command that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise LocalError(
                f'this command needs {module}, which is not installed; install it with: pip install "fedpeft[{extra}]"'
            )
    from fedpeft.process import logs  # what is checked here takes longer to load

    logs.to_standard_error()
