"""Settings of gRPC's core, which reads the environment once, at the first channel or server."""

from __future__ import annotations

import os

_NO_TLS_1_2 = "ECDHE-PSK-CHACHA20-POLY1305"
"""The one cipher suite of TLS 1.2 that is left: it needs a shared secret and no certificate, so no handshake of this
project's can take it. gRPC for Python has no setting for the version, and this list does not concern TLS 1.3."""


def silence() -> None:
    """Keeps gRPC's core from writing lines of its own to standard error: errors say the same in a sentence.

    Called before the first channel or server is made; GRPC_VERBOSITY in the environment decides otherwise.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def configure() -> None:
    """Keeps gRPC from writing lines of its own, and from speaking anything older than TLS 1.3.

    For a process that is all ours; in another's, the server at the other end sees to the version.
    """
    silence()
    os.environ["GRPC_SSL_CIPHER_SUITES"] = _NO_TLS_1_2
