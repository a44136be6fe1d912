"""A proxy of connections: takes those of strangers, bounds them, and passes their bytes on to gRPC in this process.

Notable: nothing is understood of the bytes, TLS and HTTP/2 included, so nothing that they say can take more than their
number. gRPC by itself keeps what a header without end sends, and cannot be told how many connections one address has.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

from fedpeft_server.access import bounds
from fedpeft_server.access.bounds import PortBound, Refusal
from fedpeft_server.access.pacing import TokenBucket
from fedpeft_server.access.peers import of_host
from fedpeft_server.timing import Timing

PIECE_BYTES = 16 * 1024


@dataclass(eq=False)
class Connection:
    """One connection of a stranger.

    Attributes:
        address: Its origin, as bounds count it.
        peer: The same as gRPC writes it.
        task: Serves it.
    """

    address: str
    peer: str
    task: asyncio.Task[None] | None = field(default=None, repr=False)


class ConnectionProxy:
    """Passes connections on, within the bounds of a port.

    Args:
        upstream: Path of the socket that gRPC serves.
        timing: Pause before another connection is taken where none can be.
        bound: The bounds.
        clock: Monotonic seconds.

    Attributes:
        refused: Connections that were not served to their end, by why.
    """

    def __init__(
        self,
        upstream: str,
        timing: Timing,
        bound: PortBound = bounds.ENROLMENT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pause_s = timing.enrolment_accept_retry_s
        self._upstream = upstream
        self._bound = bound
        self._clock = clock
        self._open: dict[str, OrderedDict[Connection, None]] = defaultdict(OrderedDict)
        self._opened: OrderedDict[str, TokenBucket] = OrderedDict()
        self._peers: dict[str, Connection] = {}
        self._numbers = 0
        self._taken_at = clock()
        self.refused: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """Connections that are open."""
        return sum(map(len, self._open.values()))

    def idle_s(self) -> float:
        """Returns for how long there has been no connection, seconds."""
        return 0.0 if self._open else self._clock() - self._taken_at

    def peer(self, upstream_peer: str) -> str:
        """Returns where the connection comes from that gRPC knows by the name of the proxy's socket."""
        found = self._peers.get(upstream_peer.rpartition(":")[2].lstrip("\0@"))
        return found.peer if found else "unknown"

    async def serve(self, listening: socket.socket) -> None:
        """Takes connections until it is cancelled."""
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                line, where = await loop.sock_accept(listening)
            except OSError:  # the caller left at once, or waits in the queue until a file is closed
                await asyncio.sleep(self._pause_s)
                continue
            self._taken_at = self._clock()
            line.setblocking(False)
            family = "ipv6" if line.family is socket.AF_INET6 else "ipv4"
            self.take(line, Connection(of_host(where[0]), f"{family}:{where[0]}:{where[1]}"))

    def take(self, line: socket.socket, connection: Connection) -> None:
        """Begins to serve a connection, unless its address opens too many; an older one may have to give way."""
        if not self._may_open(connection.address):
            self.refused[Refusal.OPENED_TOO_FAST] += 1
            line.close()
            return
        same = self._open[connection.address]
        if len(same) >= (self._bound.per_address or 0):
            self._drop(same, Refusal.OF_ONE_ADDRESS)
        elif self.count >= (self._bound.connections or 0):
            self._drop(max(self._open.values(), key=len), Refusal.TOO_MANY)
        same[connection] = None
        connection.task = asyncio.create_task(self._served(line, connection))
        # Not in the task, which may be cancelled before it begins.
        connection.task.add_done_callback(lambda _: self._ended(line, connection))

    def _may_open(self, address: str) -> bool:
        assert self._bound.opened is not None
        now = self._clock()
        bucket = self._opened.pop(address, None) or TokenBucket(self._bound.opened, now)
        self._opened[address] = bucket
        if len(self._opened) > bounds.MOST_CALLERS:
            self._opened.popitem(last=False)
        if bucket.wait_s(now):
            return False
        bucket.take()
        return True

    def _drop(self, of: OrderedDict[Connection, None], why: str) -> None:
        """Ends the oldest connection of an address."""
        oldest, _ = of.popitem(last=False)
        self.refused[why] += 1
        if oldest.task:
            oldest.task.cancel()

    async def _served(self, line: socket.socket, connection: Connection) -> None:
        self._numbers += 1
        name = f"fedpeft-{id(self):x}-{self._numbers}"
        self._peers[name] = connection
        try:
            with closing(socket.socket(socket.AF_UNIX)) as up:
                up.setblocking(False)
                up.bind("\0" + name)
                await asyncio.get_running_loop().sock_connect(up, self._upstream)
                await self._passed(line, up)
        except OSError:  # no open file is left, or gRPC takes no connection
            self.refused[Refusal.NOT_SERVED] += 1
        finally:
            del self._peers[name]

    def _ended(self, line: socket.socket, connection: Connection) -> None:
        line.close()
        same = self._open[connection.address]
        same.pop(connection, None)
        if not same:
            del self._open[connection.address]

    async def _passed(self, line: socket.socket, up: socket.socket) -> None:
        """Passes bytes both ways until one side ends, or the connection was long enough or said too much."""
        ways = [asyncio.create_task(self._inward(line, up)), asyncio.create_task(self._outward(up, line))]
        try:
            done, _ = await asyncio.wait(ways, timeout=self._bound.life_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                self.refused[Refusal.OPEN_TOO_LONG] += 1
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _inward(self, line: socket.socket, up: socket.socket) -> None:
        loop, left = asyncio.get_running_loop(), self._bound.received_bytes or 0
        while left > 0:
            try:
                async with asyncio.timeout(self._bound.silence_s):
                    data = await loop.sock_recv(line, min(PIECE_BYTES, left))
            except TimeoutError:
                self.refused[Refusal.NO_DATA] += 1
                return
            if not data:
                return
            left -= len(data)
            await loop.sock_sendall(up, data)
        self.refused[Refusal.TOO_MUCH_DATA] += 1

    async def _outward(self, up: socket.socket, line: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(up, PIECE_BYTES):
            await loop.sock_sendall(line, data)
