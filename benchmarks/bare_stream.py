"""The floor: clients push and pull a payload through bare `grpc.aio` streams, and nothing is done with it.

One process serves, one has all clients, each with a connection of its own. No protobuf, no checks, no disk.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
from workload import (
    CHUNK_BYTES,
    free_address,
    payload_bytes,
    peak_memory_bytes,
    print_measured,
    process,
    processor_seconds,
    scratch,
)

BLOCK = bytes(CHUNK_BYTES)


def chunks(size: int) -> Iterator[bytes]:
    for offset in range(0, size, CHUNK_BYTES):
        yield BLOCK[: min(CHUNK_BYTES, size - offset)]


async def up(messages: AsyncIterator[bytes], context: Any) -> bytes:
    size = 0
    async for chunk in messages:
        size += len(chunk)
    return size.to_bytes(8, "little")


async def down(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for chunk in chunks(int.from_bytes(request, "little")):
        yield chunk


async def serve(address: str) -> None:
    server = grpc.aio.server()
    handlers = {
        "Up": grpc.stream_unary_rpc_method_handler(up),
        "Down": grpc.unary_stream_rpc_method_handler(down),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Stream", handlers),))
    server.add_insecure_port(address)
    await server.start()
    await server.wait_for_termination()


async def push(channel: grpc.aio.Channel, size: int) -> None:
    async def messages() -> AsyncIterator[bytes]:
        for chunk in chunks(size):
            yield chunk

    answer: bytes = await channel.stream_unary("/bare.Stream/Up")(messages())
    assert int.from_bytes(answer, "little") == size


async def pull(channel: grpc.aio.Channel, size: int) -> None:
    got = 0
    async for chunk in channel.unary_stream("/bare.Stream/Down")(size.to_bytes(8, "little")):
        got += len(chunk)
    assert got == size


async def transfer(address: str, clients: int, size: int, repeat: int) -> list[dict[str, float]]:
    """Seconds until all have pushed, then until all have pulled; done once more than `repeat`, the first is dropped."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(address, options=own) for _ in range(clients)]
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        await asyncio.gather(*(push(c, size) for c in channels))
        middle = time.perf_counter()
        await asyncio.gather(*(pull(c, size) for c in channels))
        times.append({"up_s": middle - start, "down_s": time.perf_counter() - middle})
    for channel in channels:
        await channel.close()
    return times[1:]


def measure(payload: str, clients: int, repeat: int) -> dict[str, Any]:
    """Runs server and clients; medians in seconds, the server's peak memory in bytes and its processor time a GB."""
    address = free_address()
    with scratch() as folder, process([__file__, "serve", address], address, folder / "bare.log") as pid:
        size, before = payload_bytes(payload), processor_seconds(pid)
        numbers = [str(n) for n in (clients, size, repeat)]
        done = subprocess.run(
            [sys.executable, __file__, "clients", address, *numbers], check=True, capture_output=True, text=True
        )
        times = json.loads(done.stdout)
        return {
            "up_s": statistics.median(t["up_s"] for t in times),
            "down_s": statistics.median(t["down_s"] for t in times),
            "all": times,
            "server_processor_s_per_gb": (processor_seconds(pid) - before) / (2 * size * clients * (repeat + 1) / 1e9),
            "server_peak_bytes": peak_memory_bytes(pid),
        }


def main() -> None:
    match sys.argv[1:]:
        case ["serve", address]:
            asyncio.run(serve(address))
        case ["clients", address, clients, size, repeat]:
            print(json.dumps(asyncio.run(transfer(address, int(clients), int(size), int(repeat)))))
        case _:
            print_measured(measure, str(__doc__))


if __name__ == "__main__":
    main()
