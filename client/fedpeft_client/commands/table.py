"""The commands that `fedpeft-client` has beside taking part: a word, the module that does it, and what it is for.

A module of a command has `main(arguments: list[str]) -> int`: it gets the command line after the word and returns the
exit code. It is imported only when its word is said, so that no command pays for what another one needs. An error of
`fedpeft.errors` that it raises is told, and gives the exit code, as for the client itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """One command: its module, and a line for `--help`."""

    module: str
    purpose: str

    def load(self) -> Callable[[list[str]], int]:
        """Returns what does it."""
        main: Callable[[list[str]], int] = import_module(self.module).main
        return main


COMMANDS: dict[str, Command] = {
    "enroll": Command("fedpeft_client.commands.enroll", "make this site's key and get its certificate, for a token"),
    "leave": Command("fedpeft_client.commands.leave", "leave the federation for good, and remove this site's secrets"),
    "status": Command("fedpeft_client.commands.status", "show who this client is, whether it runs, and what it did"),
    "ledger": Command("fedpeft_client.commands.ledger", "show what left this device, when, and how many bytes"),
}
"""By the word that stands first on the command line."""


def listing() -> str:
    """Returns what `--help` says of the commands."""
    lines = (f"  {word:<21} {command.purpose}" for word, command in sorted(COMMANDS.items()))
    return "\n".join(["", "commands, each with a --help of its own (fedpeft-client COMMAND ...):", *lines])
