"""What gRPC is told of connections: how large, how many, and how long one is kept that nobody uses."""

from __future__ import annotations

import resource

from fedpeft.wire import MESSAGE_LIMIT_BYTES

Options = tuple[tuple[str, int], ...]

MOST_CALLS = 128
"""Calls under way on a connection; more wait in the caller. A client may have 32 (`callers.MAX_CALLS`), a console a few
for each page that is open; without a limit one connection's messages, megabytes each, could take all memory."""
IDLE_MS = 600_000
"""A connection without a call is closed after so long, and opened again by the next one. Who waits or trains calls
every 20 seconds."""
HANDSHAKE_MS = 30_000
"""Whoever connects and says nothing is let go after so long."""

_ALWAYS: Options = (
    ("grpc.so_reuseport", 0),  # a second daemon on the port must fail, not share it
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
)

FOR_STRANGERS: Options = (
    *_ALWAYS,
    ("grpc.max_receive_message_length", 16 * 1024),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.max_connection_idle_ms", 60_000),
    ("grpc.max_allowed_incoming_connections", 256),
)
"""Where devices enroll, anybody may call: a request is small, there are few on a connection, and that is soon over."""


def options() -> Options:
    """Returns the options of the port for everything but enrolment; once the limit on open files stands."""
    # The other half is for files: were all taken by connections, no update could be received or folded.
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = min(files, 2**31 - 1) // 2 if files != resource.RLIM_INFINITY else 2**30
    return (
        *_ALWAYS,
        ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_concurrent_streams", MOST_CALLS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.max_allowed_incoming_connections", most),
    )
