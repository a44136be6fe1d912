"""Waits and sizes of the processes under faults: a tenth of a user's, so that a schedule takes seconds.

Imported before anything else of FedPEFT, whose modules take these by name.
"""

from __future__ import annotations

from dataclasses import replace

from fedpeft.rpc import timing as protocol

from . import grpc_environment  # noqa: F401

protocol.HOLD_S, protocol.STALL_S = 2.0, 3.0

from fedpeft.adapters import payload  # noqa: E402

payload.CHUNK_BYTES = 64 * 1024

from fedpeft.identity import certificates  # noqa: E402

certificates.renewal = lambda one: one.not_valid_before_utc + (one.not_valid_after_utc - one.not_valid_before_utc) / 8

from fedpeft_client import timing as client  # noqa: E402
from fedpeft_client.uplink import channel  # noqa: E402
from fedpeft_server import timing as server  # noqa: E402
from fedpeft_server.rpc import connections  # noqa: E402

client.TIMING = replace(
    client.TIMING,
    call_s=3.0,
    hold_s=protocol.HOLD_S,
    stall_s=protocol.STALL_S,
    first_fault_pause_s=0.1,
    quick_s=0.1,
    first_pause_s=0.05,
    longest_pause_s=1.0,
    explain_every_s=6.0,
    ticket_check_s=1.0,
    ticket_check_again_s=0.3,
    limits_check_s=0.5,
    first_hold_s=1.0,
    longest_hold_s=4.0,
    renewal_check_s=1.0,
    renewal_first_pause_s=0.2,
    renewal_longest_pause_s=2.0,
)
server.TIMING = replace(
    server.TIMING,
    session_alive_s=3.0,
    lobby_linger_s=0.5,
    matching_check_s=0.2,
    transfer_turn_s=1.0,
    transfer_linger_s=0.5,
    refusal_delay_s=0.1,
    deadline_retry_s=0.5,
    fold_retry_s=0.5,
    traffic_write_s=0.5,
    payload_write_delay_s=0.1,
    database_busy_s=2.0,
    database_check_s=1.0,
    files_retry_s=1.0,
    database_idle_s=2.0,
    daemon_alive_s=0.5,
    daemon_gone_s=2.0,
    listen_retry_s=0.2,
    lease_s=2.0,
    lease_look_s=0.15,
    revisions_check_s=3.0,
)
connections._LEAST_PING_MS, connections._KEEPALIVE_MS, connections._KEEPALIVE_TIMEOUT_MS = 500, 2000, 1500
_SHORTER = {
    "grpc.keepalive_time_ms": 1000,
    "grpc.keepalive_timeout_ms": 1500,
    "grpc.initial_reconnect_backoff_ms": 50,
    "grpc.min_reconnect_backoff_ms": 50,
    "grpc.max_reconnect_backoff_ms": 500,
}
channel._OPTIONS[:] = [(name, _SHORTER.get(name, value)) for name, value in channel._OPTIONS]
