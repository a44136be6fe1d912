"""Finds a client's identity, and checks that its settings agree with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedpeft.errors import IdentityInvalid
from fedpeft.identity import folder
from fedpeft.identity.folder import Identity
from fedpeft.identity.subject import Role
from fedpeft_client.state.state_dir import identity_folder

FILES = ("key.pem", "authority.pem", "identity.toml", "certificate.pem")
"""Files of a complete identity, in the order in which they are written."""


def find(named: Any, state_dir: Any) -> Path | None:
    """Returns the identity folder in use.

    Args:
        named: The one that was named, if one was.
        state_dir: The state directory, if it is known.
    """
    if named is not None:
        return Path(named)
    if not isinstance(state_dir, str | Path):
        return None
    where = identity_folder(Path(state_dir))
    return where if folder.exists(where) else None


def no_identity(state_dir: Path) -> IdentityInvalid:
    """Returns what is wrong where neither an identity nor a server is found."""
    where = identity_folder(state_dir)
    lacks = [name for name in FILES if not (where / name).exists()]
    if len(lacks) == len(FILES):
        return IdentityInvalid(
            f"there is no identity in {where}: check --state-dir, or enroll first (fedpeft-client enroll); plain text, "
            "without one, needs --server and --name"
        )
    return IdentityInvalid(
        f"the identity in {where} is incomplete, without {' and '.join(lacks)}: enroll again (fedpeft-client enroll), "
        "with the same token if that was interrupted"
    )


def check(identity: Identity, *, server: str, name: str, evaluate: bool, insecure: bool) -> None:
    """Checks settings against an identity.

    Raises:
        ValueError: With the first that contradicts it.
    """
    subject, where = identity.subject, identity.folder
    if subject.role not in (Role.CLIENT, Role.EVALUATOR):
        raise ValueError(
            f"the certificate in {where} is that of {subject}, which cannot take part in runs; enroll a client or an "
            "evaluator"
        )
    if name != subject.name:
        raise ValueError(f"name {name}: the certificate in {where} speaks for {subject.name}; leave --name out")
    if server != identity.server:
        raise ValueError(
            f"server {server}: the identity in {where} is for {identity.server}; leave --server out, or write the new "
            f"address into {where / 'identity.toml'} if that server has moved"
        )
    if subject.role is Role.EVALUATOR and not evaluate:
        raise ValueError(f"the certificate in {where} is an evaluator's; say --evaluate")
    if subject.role is Role.CLIENT and evaluate:
        raise ValueError(
            f"--evaluate: the certificate in {where} is that of a client that trains; an evaluator needs a token of "
            "role evaluator"
        )
    if insecure:
        raise ValueError(f"--insecure asks for plain text, and there is a certificate in {where}; leave --insecure out")
