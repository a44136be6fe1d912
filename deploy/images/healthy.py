"""The server's health check: asks the running server's own health service, over TLS if it has certificates.

Exit code 0: it serves. It reads the variables that the server reads, and no secret: the port for enrolment takes
callers without a certificate, and health is one of the two things that they may ask for.

    python /opt/fedpeft/healthy.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PATIENCE_S = 5


def main() -> int:
    """Asks, and says in one line what was wrong."""
    listen = os.environ.get("FEDPEFT_SERVER_LISTEN", "127.0.0.1:7070")
    data = Path(os.environ.get("FEDPEFT_SERVER_DATA_DIR", "/var/lib/fedpeft"))
    authority = Path(os.environ.get("FEDPEFT_SERVER_IDENTITY") or data / "identity") / "authority.pem"
    try:
        with _channel(int(listen.rpartition(":")[2]), authority) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    except (grpc.RpcError, OSError) as error:
        print(f"the server does not answer: {error}", file=sys.stderr)
        return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _channel(port: int, authority: Path) -> grpc.Channel:
    """Opens a channel to this machine's server: to the port for enrolment where there are certificates."""
    if not authority.exists():
        return grpc.insecure_channel(f"127.0.0.1:{port}")
    enroll = int(os.environ.get("FEDPEFT_SERVER_ENROLL", f":{port + 1}").rpartition(":")[2])
    return grpc.secure_channel(f"localhost:{enroll}", grpc.ssl_channel_credentials(authority.read_bytes()))


if __name__ == "__main__":
    sys.exit(main())
