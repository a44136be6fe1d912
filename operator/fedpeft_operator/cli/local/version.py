"""`fedpeft version`."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated

import typer

from fedpeft import PROTOCOL, __version__
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import epilog

EPILOG = epilog("fedpeft version --json")

_PARTS = ("grpcio", "numpy", "torch", "timm", "peft")


def version(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the versions of FedPEFT, its protocol, and what they run on."""
    found = {"fedpeft": __version__, "protocol": PROTOCOL, "python": platform.python_version()}
    for part in _PARTS:
        try:
            found[part] = metadata.version(part)
        except metadata.PackageNotFoundError:
            found[part] = None
    if as_json:
        output.say_json(found)
        return
    for name, value in found.items():
        output.say(f"{name} {value or 'not installed'}")
