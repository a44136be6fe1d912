"""Settings of gRPC's core, which reads the environment once, at the first channel or server."""

from __future__ import annotations

import os

from fedpeft.process.logs import silence_grpc

_NO_TLS_1_2 = "ECDHE-PSK-CHACHA20-POLY1305"
"""The one cipher suite of TLS 1.2 that is left: it needs a shared secret and no certificate, so no handshake of this
project's can take it. gRPC for Python has no setting for the version, and this list does not concern TLS 1.3."""


def configure() -> None:
    """Keeps gRPC from writing lines of its own, and from speaking anything older than TLS 1.3.

    For a process that is all ours; in another's, the server at the other end sees to the version.
    """
    silence_grpc()
    os.environ["GRPC_SSL_CIPHER_SUITES"] = _NO_TLS_1_2
