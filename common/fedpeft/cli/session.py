"""What the global flags said, for every command; and the door to the parts that only some installations have."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from fedpeft.addresses import Address
from fedpeft.errors import LocalError, SettingsInvalid

if TYPE_CHECKING:
    from fedpeft.operator_client import OperatorClient

T = TypeVar("T")

DEFAULT_SERVER = "127.0.0.1:7070"


@dataclass
class Session:
    """The global flags; the one object that all commands share.

    Attributes:
        server: HOST:PORT of the server.
        verbose: Whether an error shows its traceback.
    """

    server: str = DEFAULT_SERVER
    verbose: bool = False

    def client(self) -> OperatorClient:
        """Returns a client of the server; enter it with `async with`.

        Raises:
            SettingsInvalid: If the address is not HOST:PORT.
        """
        from fedpeft.logs import silence_grpc

        silence_grpc()
        from fedpeft.operator_client import OperatorClient

        return OperatorClient(address(self.server))


def session_of(context: typer.Context) -> Session:
    """Returns the session of a command."""
    return context.ensure_object(Session)


def address(text: str) -> str:
    """Returns `text` if it is HOST:PORT.

    Raises:
        SettingsInvalid: If it is not.
    """
    try:
        Address.parse(text)
    except ValueError as error:
        raise SettingsInvalid(f"--server: {error}") from None
    return text


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Runs a command's asynchronous part to its end."""
    return asyncio.run(work)


def require(extra: str, *modules: str) -> None:
    """Checks that an optional part of the installation is there, without loading it.

    Raises:
        LocalError: With the command that installs it.
    """
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise LocalError(
                f'this command needs {module}, which is not installed; install it with: pip install "fedpeft[{extra}]"'
            )
