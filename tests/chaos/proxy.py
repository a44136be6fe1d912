"""A TCP proxy between clients and daemons, a port for each client, whose lines can be made bad.

Where there are several daemons a connection goes to the next one that takes it, as with a balancer of connections.

It takes a line of JSON for each change from the harness: `{"link": 0, "what": "throttle", "amount": 1e5}`.

    cut        connections are reset, and new ones refused
    reset      connections are reset
    stall      nothing moves, up, down or both ways (amount 1, 2, 3); connections stay
    delay      whatever is read waits for so many seconds
    throttle   so many bytes a second pass
    truncate   after so many bytes more on their way up each connection ends in the middle
    repeat     what each connection carried up so far is sent once more, on a connection of its own
    heal       all is well again
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

READ_BYTES = 65_536
RECORDED_BYTES = 4 * 1024 * 1024
"""So much of a connection can be repeated."""
REPEATED_S = 2.0
"""The answers to a repetition are read for so long."""
UP, DOWN = 1, 2


class Link:
    """The line of one client.

    Args:
        targets: Ports that its connections go to, one after the other.
    """

    def __init__(self, targets: Sequence[int]) -> None:
        self._targets = deque(targets)
        self._pairs: set[_Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.heal()

    def heal(self) -> None:
        """Ends all faults."""
        self.is_cut, self.delay_s, self.bytes_per_s, self.stalled = False, 0.0, 0.0, 0
        for pair in self._pairs:
            pair.left = None

    def change(self, what: str, amount: float) -> None:
        """Makes the line bad, or good again."""
        match what:
            case "heal":
                self.heal()
            case "cut" | "reset":
                self.is_cut = what == "cut"
                for pair in list(self._pairs):
                    pair.reset()
            case "stall":
                self.stalled = int(amount)
            case "delay":
                self.delay_s = amount
            case "throttle":
                self.bytes_per_s = amount
            case "truncate":
                for pair in self._pairs:
                    pair.left = int(amount)
            case "repeat":
                for pair in self._pairs:
                    self._begin(self._repeat(bytes(pair.recorded)))

    def _begin(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[arg-type]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a connection."""
        if self.is_cut:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await self._open()
        except OSError:
            _reset(writer)
            return
        pair = _Pair(writer, far_writer)
        self._pairs.add(pair)
        both = self._pump(pair, reader, far_writer, UP), self._pump(pair, far_reader, writer, DOWN)
        ways = [asyncio.ensure_future(way) for way in both]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._pairs.discard(pair)
            pair.close()
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connects to the next target that takes it.

        Raises:
            OSError: If none does.
        """
        for left in reversed(range(len(self._targets))):
            self._targets.rotate(-1)
            try:
                return await asyncio.open_connection("127.0.0.1", self._targets[0])
            except OSError:
                if not left:
                    raise
        raise AssertionError("a line has targets")

    async def _pump(self, pair: _Pair, source: asyncio.StreamReader, sink: asyncio.StreamWriter, way: int) -> None:
        with suppress(ConnectionError):  # one side was killed, which is what this is for
            while data := await source.read(READ_BYTES):
                await self._wait(len(data), way)
                if way == UP:
                    data = pair.passing(data)
                sink.write(data)
                await sink.drain()
                if way == UP and pair.left == 0:
                    return

    async def _wait(self, length: int, way: int) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.bytes_per_s:
            await asyncio.sleep(length / self.bytes_per_s)
        while self.stalled & way:
            await asyncio.sleep(0.02)

    async def _repeat(self, recorded: bytes) -> None:
        with suppress(OSError, TimeoutError):
            reader, writer = await self._open()
            try:
                async with asyncio.timeout(REPEATED_S):
                    writer.write(recorded)
                    while await reader.read(READ_BYTES):
                        continue
            finally:
                _reset(writer)


class _Pair:
    """A connection and the one behind it; `left` bytes may still go up, if that is bounded."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self._ends = near, far
        self.left: int | None = None
        self.recorded = bytearray()

    def passing(self, data: bytes) -> bytes:
        """Returns what of the data goes on."""
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
        self.recorded += data[: RECORDED_BYTES - len(self.recorded)]
        return data

    def reset(self) -> None:
        for end in self._ends:
            _reset(end)

    def close(self) -> None:
        for end in self._ends:
            end.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None and connection.fileno() >= 0:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def serve(listeners: Sequence[socket.socket], targets: Sequence[Sequence[int]], control: socket.socket) -> None:
    """Serves until the control connection ends.

    Args:
        listeners: A listening socket for each link.
        targets: The ports that each link leads to.
        control: Says what becomes of the links.
    """
    links = [Link(ports) for ports in targets]
    servers = [
        await asyncio.start_server(link.connected, sock=listener)
        for link, listener in zip(links, listeners, strict=True)
    ]
    reader, writer = await asyncio.open_connection(sock=control)
    while line := await reader.readline():
        said = json.loads(line)
        links[said["link"]].change(said["what"], said.get("amount", 0.0))
    for server in servers:
        server.close()
    writer.close()
