"""The bounds on connections as gRPC takes them; nobody is refused for good."""

from __future__ import annotations

import resource

from fedpeft.rpc.wire import MESSAGE_LIMIT_BYTES
from fedpeft_server.access.bounds import PortBound

Options = tuple[tuple[str, int], ...]

_LEAST_PING_MS = 10_000
_KEEPALIVE_MS = 30_000
_KEEPALIVE_TIMEOUT_MS = 20_000


def options(bound: PortBound, message_bytes: int = MESSAGE_LIMIT_BYTES) -> Options:
    """Returns the options of a port; those of the main one once the limit on open files stands.

    Args:
        bound: The bounds on its connections.
        message_bytes: Largest message taken.
    """
    bounded = (
        ("grpc.server_handshake_timeout_ms", bound.silence_s and _ms(bound.silence_s)),
        ("grpc.max_connection_idle_ms", bound.idle_s and _ms(bound.idle_s)),
        ("grpc.max_concurrent_streams", bound.streams),
    )
    return (
        *((name, value) for name, value in bounded if value),
        # Otherwise the windows grow with the line's speed, and with them what arrives of messages before they are read.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.so_reuseport", 0),  # a second daemon on the port must fail, not share it
        ("grpc.max_allowed_incoming_connections", bound.connections or _half_of_the_files()),
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", _LEAST_PING_MS),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def _half_of_the_files() -> int:
    """Returns how many connections leave the other half for files: without them no update is received or folded."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(files, 2**31 - 1) // 2 if files != resource.RLIM_INFINITY else 2**30


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
