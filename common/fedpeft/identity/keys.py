"""Private keys: P-256, made where they are used, in files that only their owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedpeft import text_files
from fedpeft.errors import IdentityInvalid

PrivateKey = ec.EllipticCurvePrivateKey


def make() -> PrivateKey:
    """Returns a new key."""
    return ec.generate_private_key(ec.SECP256R1())


def to_pem(key: PrivateKey) -> bytes:
    """Returns a key as unencrypted PKCS #8; what protects it is the mode of its file."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def load(path: Path) -> PrivateKey:
    """Reads a key.

    Raises:
        IdentityInvalid: If the file is missing, open to others, or holds no P-256 key.
    """
    check_private(path)
    try:
        key = load_pem_private_key(text_files.read_bytes(path), password=None)
    except OSError as error:
        raise IdentityInvalid(f"{path} cannot be read: {error.strerror}") from None
    except text_files.NotText as error:
        raise IdentityInvalid(f"{path} holds no private key: {error}") from None
    except (ValueError, TypeError):
        raise IdentityInvalid(f"{path} holds no unencrypted private key in PEM form") from None
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityInvalid(f"{path} holds a key that is not on the curve P-256; make one of that kind")
    return key


def check_private(path: Path) -> None:
    """Checks that nobody but its owner, who is this user, can read a file.

    Raises:
        IdentityInvalid: If it is missing, another user's, or open to others.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise IdentityInvalid(f"{path} cannot be read: {error.strerror}") from None
    if status.st_uid != os.geteuid():
        raise IdentityInvalid(f"{path} belongs to another user; it is secret and must belong to the one that uses it")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise IdentityInvalid(f"{path} is open to others (mode {mode:04o}); it is secret: chmod 600 {path}")
