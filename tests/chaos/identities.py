"""Certificates of a world over TLS: the daemon's as `fedpeft-server init` makes them, the others' as from a token.

A client renews its certificate after an eighth of its life, so that it does so within a schedule and has time for more
attempts than a schedule has faults.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from fedpeft.identity import folder
from fedpeft.identity.subject import Role, Subject
from fedpeft_server.access.certificates import read_authority
from fedpeft_server.access.files import Files
from fedpeft_server.commands import init

from .mains import CERTIFICATES_S, DAEMONS, EVALUATOR

OPERATOR = "operator"


def make(place: Path, port: int, ports: Mapping[str, int]) -> int:
    """Makes the identity folders of all machines and of the operator, each by its name in `place`.

    Args:
        place: An empty folder.
        port: The daemon's.
        ports: Ports at which the others reach it, by name.
    """
    flags = ["--data-dir", str(place / "data"), "--host", "127.0.0.1", "--port", str(port)]
    init.main([*flags, "--operator", OPERATOR, "--operator-identity", str(place / OPERATOR)])
    authority = read_authority(Files(place / "data" / "identity"))
    assert authority is not None
    for name, reached_at in ports.items():
        key = folder.take_key(place / name)
        subject = Subject(Role.EVALUATOR if name == EVALUATOR else Role.CLIENT, name)
        certificate = authority.issue(subject, key.public_key(), timedelta(seconds=CERTIFICATES_S))
        folder.write(place / name, f"127.0.0.1:{reached_at}", [authority.certificate], [certificate])
    return 0


def give(place: Path, name: str, disk: Path) -> None:
    """Puts the identity of a machine onto its disk."""
    if name in DAEMONS:
        shutil.copytree(place / "data", disk / "data")
    else:
        (disk / "state").mkdir(0o700)
        shutil.copytree(place / name, disk / "state" / "identity")
