"""Enrolment tokens: one line that takes a device to its server, proves the server to it, and it to the server.

    fedpeft1.ADDRESS.ENROLLMENT.AUTHORITY.SECRET.CHECK

The parts are base64url without padding: the server's HOST:PORT, the HOST:PORT where devices enroll, the authority's
certificate in DER, 32 random bytes, and the first 4 bytes of the SHA-256 of the line before them, because what is
copied by hand gets cut. The authority's certificate itself is in it and not a fingerprint only: so a device trusts
nothing that it has not been given by the operator, not even for a moment.
"""

from __future__ import annotations

import binascii
import hashlib
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from fedpeft.errors import IdentityInvalid

SECRET_BYTES = 32
MAX_LENGTH = 8192
"""Characters of a token at most; those that FedPEFT's own authority is in have about 720."""

_FORM = "fedpeft1"
_CHECK_BYTES = 4


@dataclass(frozen=True)
class EnrollmentToken:
    """The facts that a device needs to ask for its first certificate.

    Attributes:
        server: HOST:PORT of the server.
        enrollment: HOST:PORT where devices enroll.
        authority: Certificate of the authority that signed the server's.
        secret: 32 random bytes, usable once; the server keeps their digest only.
    """

    server: str
    enrollment: str
    authority: x509.Certificate = field(repr=False)
    secret: bytes = field(repr=False)

    @classmethod
    def make(cls, server: str, enrollment: str, authority: x509.Certificate) -> Self:
        """Returns a token with a new secret."""
        return cls(server, enrollment, authority, secrets.token_bytes(SECRET_BYTES))

    @property
    def digest(self) -> bytes:
        """SHA-256 of the secret, what the server keeps; it is too random to be guessed, so no slower hash is needed."""
        return digest(self.secret)

    def encode(self) -> str:
        """Returns the line."""
        parts = (
            self.server.encode(),
            self.enrollment.encode(),
            self.authority.public_bytes(Encoding.DER),
            self.secret,
        )
        line = ".".join((_FORM, *map(_to_text, parts)))
        return f"{line}.{_check(line)}"

    @classmethod
    def decode(cls, text: str) -> Self:
        """Returns the token of a line; white space around it is no matter.

        Raises:
            IdentityInvalid: If it is no token, or not a whole one. The message has nothing of the token in it.
        """
        text = text.strip()
        if not text:
            raise IdentityInvalid("the enrolment token is empty; make one and copy the whole line")
        form, *parts = text.split(".") if len(text) <= MAX_LENGTH else [""]
        if form != _FORM:
            raise IdentityInvalid(f"this is not an enrolment token of this version: one begins with {_FORM}.")
        if len(parts) != 5 or _check(text.rpartition(".")[0]) != parts[-1]:
            raise IdentityInvalid("the enrolment token is damaged, cut short perhaps; copy the whole line again")
        try:
            server, enrollment, authority, secret = map(_of_text, parts[:-1])
            token = cls(server.decode(), enrollment.decode(), x509.load_der_x509_certificate(authority), secret)
        except (ValueError, binascii.Error):
            raise IdentityInvalid("the enrolment token is malformed; ask for another") from None
        if len(secret) != SECRET_BYTES:
            raise IdentityInvalid("the enrolment token is malformed; ask for another")
        return token


def digest(secret: bytes) -> bytes:
    """Returns what is kept of a secret, 32 bytes."""
    return hashlib.sha256(secret).digest()


def _to_text(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _of_text(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _check(line: str) -> str:
    return _to_text(hashlib.sha256(line.encode()).digest()[:_CHECK_BYTES])
