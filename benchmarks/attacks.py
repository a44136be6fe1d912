"""Measures the effect of an attack on an honest caller: a real daemon over TLS, attackers in a process of their own.

    python benchmarks/attacks.py [--seconds 8] [--only NAME]

For each attack: the latency of health checks that an operator makes beside it (20 a second), the memory and the open
files of the daemon's processes at their most, and the bytes of log that it wrote in a second. Everything happens on
loopback, against a daemon of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from round import create, synthetic_spec
from workload import Daemon, daemon, scratch

from fedpeft.identity import certificates, keys
from fedpeft.identity.folder import Identity
from fedpeft.rpc import wire
from fedpeft.rpc.channel import open_channel, open_unnamed

PROBE_S = 0.05
OPEN_FILES = 1024
CALLS_AT_ONCE = 16
CLIENTS = 8
MESSAGE_BYTES = 4 * 1024 * 1024 - 64
FEDERATION = "/fedpeft.v1.FederationService"


@dataclass(frozen=True)
class Target:
    """Addresses of a daemon, and an attacker's credentials."""

    address: str
    enroll: str
    metrics: str
    identities: str
    run: str
    seconds: float

    def identity(self, number: int = 0) -> Identity:
        """Returns the identity of one of the clients that were enrolled."""
        return Identity.load(Path(self.identities) / f"client-{number:03}")


async def repeat(
    target: Target,
    call: Callable[[grpc.aio.Channel], Awaitable[object]],
    channels: int = 4,
    callers: int = 1,
    at_once: int = CALLS_AT_ONCE,
) -> int:
    """Calls as fast as answers come, on several connections of one client or more; returns how often."""
    end, done = time.monotonic() + target.seconds, 0

    async def one(channel: grpc.aio.Channel) -> None:
        nonlocal done
        while time.monotonic() < end:
            with suppress(grpc.aio.AioRpcError):  # a refusal is an answer: what counts is what it costs
                await asyncio.wait_for(call(channel), max(0.1, end - time.monotonic()))
            done += 1

    opened = [open_channel(target.address, target.identity(number % callers)) for number in range(channels)]
    with suppress(TimeoutError):  # the time of the attack is over
        await asyncio.gather(*(one(channel) for channel in opened for _ in range(at_once // channels)))
    for channel in opened:
        await channel.close()
    return done


def metadata() -> tuple[tuple[str, str], ...]:
    """Returns the metadata of the attacker's client."""
    return ((wire.CLIENT_KEY, "client-000"), (wire.INSTANCE_KEY, "0" * 32))


def sender(method: str, data: bytes) -> Callable[[grpc.aio.Channel], Awaitable[object]]:
    """Returns what sends bytes as a unary call."""
    return lambda channel: channel.unary_unary(method)(data, metadata=metadata())


async def registered(target: Target) -> None:
    """Registers the attacker as a trainer."""
    async with open_channel(target.address, target.identity()) as channel:
        await sender(f"{FEDERATION}/Register", b"\x08\x01\x10\x01\x18\x01")(channel)


async def reasons(target: Target) -> int:
    """Sends 1.4 million reasons of one letter with every answer to an offer."""
    await registered(target)
    head = _text(1, target.run) + b"\x10\x02"
    return await repeat(target, sender(f"{FEDERATION}/AnswerOffer", head + b"\x1a\x01x" * (MESSAGE_BYTES // 3 - 50)), 2)


async def empties(target: Target) -> int:
    """Sends manifests of two million tensors, each an empty message of two bytes."""
    inner = b"\x0a\x00" * (MESSAGE_BYTES // 2 - 64)
    spec = b"\x12" + _varint(len(inner)) + inner  # AdapterSpec with tensors that are empty
    header = b"\x0a" + _varint(len(spec)) + spec
    stub = "/fedpeft.v1.FederationService/PushUpdate"
    return await repeat(target, lambda c: c.stream_unary(stub)(iter([header]), metadata=metadata()), 2)


async def crowd(target: Target) -> int:
    """Sends messages of 4 MiB from eight clients, 64 at once."""
    large = b"\x7a" + _varint(MESSAGE_BYTES - 64) + bytes(MESSAGE_BYTES - 64)
    return await repeat(target, lambda c: c.unary_unary(f"{FEDERATION}/AnswerOffer")(large), 8, CLIENTS, 64)


async def refused(target: Target) -> int:
    """Makes calls that a client may not make, as fast as they are refused."""
    return await repeat(target, sender("/fedpeft.v1.OperatorService/ListRuns", b""))


async def flips(target: Target) -> int:
    """Accepts a run and declines it, by turns, with eight long reasons."""
    await registered(target)
    long = b"".join(_text(3, "x" * 512) for _ in range(8))
    answers = [_text(1, target.run) + b"\x10\x01", _text(1, target.run) + b"\x10\x02" + long]
    turn = iter(range(10**9))
    method = f"{FEDERATION}/AnswerOffer"
    return await repeat(target, lambda c: c.unary_unary(method)(answers[next(turn) % 2], metadata=metadata()))


async def strangers(target: Target) -> int:
    """Calls what strangers may not, at the port for enrolment, as fast as it is refused."""
    authority = target.identity().authority
    end, done = time.monotonic() + target.seconds, 0

    async def one() -> None:
        nonlocal done
        async with open_unnamed(target.enroll, authority) as channel:
            while (left := end - time.monotonic()) > 0:
                with suppress(grpc.aio.AioRpcError, TimeoutError):  # a refusal is an answer, and then the time is over
                    await asyncio.wait_for(channel.unary_unary("/fedpeft.v1.OperatorService/ListRuns")(b""), left)
                done += 1

    await asyncio.gather(*(one() for _ in range(CALLS_AT_ONCE)))
    return done


async def silence(target: Target) -> int:
    """Opens connections to the metrics port, as many as it takes, and says nothing."""
    end = time.monotonic() + target.seconds
    host, _, port = target.metrics.rpartition(":")
    opened = [socket.socket() for _ in range(2 * OPEN_FILES)]
    for line in opened:
        line.setblocking(False)  # those beyond the backlog go on trying by themselves
        line.connect_ex((host, int(port)))
    await asyncio.sleep(end - time.monotonic())
    return len(opened)


async def continuation(target: Target) -> int:
    """Sends HTTP/2 headers without end to the port for enrolment, on 16 connections."""
    return sum(await asyncio.gather(*(asyncio.to_thread(_headers_without_end, target) for _ in range(16))))


def _headers_without_end(target: Target) -> int:
    """Sends CONTINUATION frames on connection after connection; returns the bytes."""
    trusted = certificates.to_pem(*target.identity().authority).decode()
    context = ssl.create_default_context(cadata=trusted)
    context.set_alpn_protocols(["h2"])
    host, sent, end = target.enroll.rpartition(":")[0], 0, time.monotonic() + target.seconds
    # A literal header whose value has 2^28 bytes: what has arrived of it must be kept, or the connection ended.
    begin = b"\x00\x01x" + b"\x7f" + _varint(2**28 - 127)
    piece = struct.pack(">I", 16_384)[1:] + b"\x09\x00" + struct.pack(">I", 1) + b"\x61" * 16_384
    while time.monotonic() < end:
        # An end of the connection is what the attack provokes; it opens the next one.
        with suppress(OSError), closing(context.wrap_socket(_connect(target.enroll), server_hostname=host)) as line:
            line.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            line.sendall(struct.pack(">I", len(begin))[1:] + b"\x01\x00" + struct.pack(">I", 1) + begin)
            while time.monotonic() < end:
                line.sendall(piece)
                sent += len(piece)
    return sent


ATTACKS: dict[str, Callable[[Target], Awaitable[int]]] = {
    each.__name__: each for each in (reasons, empties, crowd, refused, flips, strangers, silence, continuation)
}


def _text(field: int, text: str) -> bytes:
    data = text.encode()
    return bytes([field << 3 | 2]) + _varint(len(data)) + data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), 2)


def processes(pid: int) -> list[int]:
    """Returns a process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += processes(int(child))
    return found


def resident(pid: int) -> int:
    """Returns the resident memory of a process, bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def attacking(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The attacker's process; it is ended with the block, should the block end before it does."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attacker:
        try:
            yield attacker
        finally:
            attacker.kill()


def observe(target: Target, server: Daemon, log: Path, attack: str) -> dict[str, Any]:
    """Runs one attack and returns what was seen beside it."""
    command = [sys.executable, __file__, "--attack", attack, "--target", json.dumps(asdict(target))]
    latencies, failures, memory, files = [], 0, 0, 0
    assert server.identity is not None
    with grpc.secure_channel(server.address, _credentials(server.identity)) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        check(health_pb2.HealthCheckRequest(), timeout=10)
        before, begun = log.stat().st_size, time.monotonic()
        with attacking(command) as attacker:
            while attacker.poll() is None:
                at = time.monotonic()
                try:
                    check(health_pb2.HealthCheckRequest(), timeout=10)
                    latencies.append(time.monotonic() - at)
                except grpc.RpcError:
                    failures += 1
                with suppress(OSError):  # a process of it ended in between; the next look sees the others
                    everyone = processes(server.pid)
                    memory = max(memory, sum(map(resident, everyone)))
                    files = max(files, len(os.listdir(f"/proc/{server.pid}/fd")))
                time.sleep(PROBE_S)
            took = time.monotonic() - begun
            written = log.stat().st_size - before
            done, _ = attacker.communicate()
    return {
        "attack": attack,
        "done": done.strip(),
        "checks": len(latencies),
        "failed": failures,
        "median_s": round(statistics.median(latencies), 4) if latencies else None,
        "worst_s": round(max(latencies), 3) if latencies else None,
        "memory_mb": round(memory / 1e6),
        "files": files,
        "log_bytes_s": round(written / took),
    }


def _credentials(identity: Identity) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(
        certificates.to_pem(*identity.authority), keys.to_pem(identity.key), certificates.to_pem(*identity.chain)
    )


def main() -> None:
    """Runs the attacks, each against a daemon of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--only", choices=list(ATTACKS))
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.attack:
        print(asyncio.run(ATTACKS[chosen.attack](Target(**json.loads(chosen.target)))))
        return
    for attack in [chosen.only] if chosen.only else ATTACKS:
        with scratch() as folder, daemon(folder, tls=True, open_files=OPEN_FILES) as server:
            server.enroll(folder, CLIENTS)
            run = create(server, synthetic_spec("small"), 4, 1)
            ends = (server.address, server.enrolling, server.metrics)
            target = Target(*ends, str(folder / "identities"), run, chosen.seconds)
            print(json.dumps(observe(target, server, folder / "server.log", attack)), flush=True)


if __name__ == "__main__":
    main()
