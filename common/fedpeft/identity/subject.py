"""Subject of a certificate: a role and a name, written as a SPIFFE id in its subject alternative names.

The form is that of the SPIFFE standard (SPIFFE-ID, section 2), so that an authority of the operator's own, SPIRE or
step-ca for example, can issue certificates that are understood here: `spiffe://DOMAIN/fedpeft/ROLE/NAME`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from fedpeft import ids
from fedpeft.errors import IdentityInvalid

DOMAIN = "fedpeft.internal"
"""The trust domain of the certificates that FedPEFT issues; those of another authority may have any."""

_ID = re.compile(r"spiffe://[a-z0-9._\-]{1,255}/fedpeft/([a-z]+)/([^/]+)")


class Role(StrEnum):
    """Role of a certificate's bearer; the server's table of rights has a column for each."""

    OPERATOR = "operator"
    VIEWER = "viewer"
    CLIENT = "client"
    EVALUATOR = "evaluator"


@dataclass(frozen=True)
class Subject:
    """The role and name that a certificate speaks for.

    Attributes:
        role: Role, which decides its rights.
        name: As `ids.CLIENT`; the client id of a client.

    Raises:
        IdentityInvalid: If the name is malformed.
    """

    role: Role
    name: str

    def __post_init__(self) -> None:
        if not ids.CLIENT.fullmatch(self.name):
            raise IdentityInvalid(f"the name {self.name[:80]!r} must be {ids.CLIENT_FORM}")

    def __str__(self) -> str:
        return f"{self.role} {self.name}"

    @property
    def id(self) -> str:
        """The SPIFFE id."""
        return f"spiffe://{DOMAIN}/fedpeft/{self.role}/{self.name}"

    @classmethod
    def of_id(cls, text: str) -> Self:
        """Returns the subject of a SPIFFE id of any trust domain.

        Raises:
            IdentityInvalid: If it is none of FedPEFT's, or its role or name is not one.
        """
        match = _ID.fullmatch(text)
        if not match:
            raise IdentityInvalid(f"{text[:300]!r} is not of the form spiffe://DOMAIN/fedpeft/ROLE/NAME")
        role, name = match.groups()
        if role not in set(Role):
            raise IdentityInvalid(f"{text[:300]!r} has the role {role!r}; there are {', '.join(Role)}")
        return cls(Role(role), name)
