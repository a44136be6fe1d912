"""Shell completion of daemon and agent: a script for the shell, made from the flags that there are."""

from __future__ import annotations

from argparse import ArgumentParser

import shtab

from fedpeft.errors import SettingsInvalid

FLAG = "--print-completion"
SHELLS = ("bash", "zsh", "tcsh")


def asked_for(arguments: list[str]) -> str | None:
    """Returns the shell whose script a command line asks for, or nothing if it asks for none.

    Raises:
        SettingsInvalid: If it asks for a shell that there is no script for.
    """
    if FLAG not in arguments:
        return None
    shell = next(iter(arguments[arguments.index(FLAG) + 1 :]), "")
    if shell not in SHELLS:
        raise SettingsInvalid(f"{FLAG} needs the name of a shell, {', '.join(SHELLS[:-1])} or {SHELLS[-1]}")
    return shell


def script(parser: ArgumentParser, shell: str) -> str:
    """Returns what the shell has to read to complete the flags of a parser."""
    return str(shtab.complete(parser, shell=shell))
