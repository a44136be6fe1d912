"""Counts bytes where they pass: for Prometheus at once, for each client and round into the database.

Wire bytes are whole serialized messages, counted in the (de)serializers, so that nothing is serialized twice to be
measured. Payload bytes are the encoded tensors inside them.

Every transition of a run (a receipt, a withdrawal, a refusal, a commit...) writes what was counted for the run so far,
in its own transaction; what passes between two transitions is written every few seconds, and soon after a payload
moved. A process that is killed in between loses none of an upload all the same, because the spool's files say how much
arrived: a restart counts what the database lacks of them (`Database.count_spooled`), a receipt its payload at least,
and a download that is resumed what must have come before.

Bytes belong to the round of the ticket or version that they are about, whichever round is in progress by then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from prometheus_client import Counter

from fedpeft_server.access.call import CALL, DIRECTIONS, Call, Direction, Key
from fedpeft_server.metrics import Metrics
from fedpeft_server.store.rows import Traffic
from fedpeft_server.store.store import Store
from fedpeft_server.tasks import ended, succeeded
from fedpeft_server.timing import Timing


class ByteCounter:
    """The bytes that are not in the database yet, and their Prometheus counters.

    Args:
        metrics: The counters.
        timing: Time in which other daemons write what they have sent.
    """

    def __init__(self, metrics: Metrics, timing: Timing) -> None:
        self._metrics = metrics
        self._timing = timing
        self._pending: dict[str, dict[Key, Traffic]] = {}  # by run, so that a transition looks at its own run's alone
        self._least: dict[Key, Traffic] = {}  # what was counted at least, where that could not be written
        self._least_due: dict[Key, float] = {}  # times, monotonic, before which that is not written
        self._rounds: dict[str, _Rounds] = {}
        self._lasting: set[str] = set()
        self._wire: dict[tuple[str, Direction], Counter] = {}
        self.moved = asyncio.Event()
        """Set once a payload passed that is not in the database yet."""

    def wire(self, call: Call, direction: Direction, size_bytes: int) -> None:
        """Books one serialized message, or keeps it until the call says where it belongs."""
        if call.key is None:
            call.unbooked[direction] += size_bytes
        else:
            self._book_wire(call.key, call.training, direction, size_bytes)

    def assign(self, run: str, number: int, client: str, *, training: bool = True) -> None:
        """Says where the bytes of the current call belong; those before are booked there too."""
        self._settle(CALL.get(), (run, number, client), training=training)

    def close(self, call: Call) -> None:
        """Books what belongs to no run, the answer that is still to be serialized included."""
        if call.key is None:
            self._settle(call, ("", 0, ""), training=False)

    def payload(self, direction: Direction, encoding: str, size_bytes: int) -> None:
        """Books encoded tensors of the current call, which must be assigned."""
        call = CALL.get()
        if call.key is None:
            raise RuntimeError(f"{call.method} books a payload before it says whose it is")
        self._metrics.payload_bytes.labels(call.key[0], direction, encoding).inc(size_bytes)
        if call.training:
            up, down = (size_bytes, 0) if direction == "up" else (0, size_bytes)
            self._add(call.key, Traffic(0, 0, up, down))
            if call.key in self._least:  # which was counted up to where this call began
                self._least[call.key] += Traffic(0, 0, up, down)
            self.moved.set()

    async def resumed(self, store: Store, position: int) -> None:
        """Books what a download that goes on at byte `position` must have brought before, if the database lacks it.

        A process that was killed took the last part of what it had sent with it.

        What cannot be written now is written with what is pending, also where the caller has left. Where another daemon
        may have sent it that has not written it yet, it is left for `traffic_others_s`.

        Raises:
            FedpeftError: If it cannot be written.
        """
        call = CALL.get()
        if call.key is None or not call.training:
            return
        if store.db.is_shared:  # another daemon may have sent it, and be about to write that
            self._least[call.key] = self._least.get(call.key, Traffic()).at_least(payload_down=position)
            self._least_due[call.key] = time.monotonic() + self._timing.traffic_others_s
        else:
            least = {call.key: Traffic(payload_down=position)}
            await self.hand_out(store, partial(store.db.count_at_least, least), call.key[0], least)

    async def write(self, store: Store) -> None:
        """Writes what is not in the database yet; what could not be written waits for the next time.

        Raises:
            DiskFull: If there is no room.
            DatabaseUnavailable: If the database is out of reach.
        """
        self.moved.clear()
        now = time.monotonic()
        least = {key: traffic for key, traffic in self._least.items() if self._least_due.get(key, 0.0) <= now}
        for key in least:
            del self._least[key]
            self._least_due.pop(key, None)
        if least:
            await self.hand_out(store, partial(store.db.count_at_least, least), least=least)
        elif self._pending:
            await self.hand_out(store, store.db.add_traffic)

    async def hand_out(
        self,
        store: Store,
        transaction: Callable[[Mapping[Key, Traffic]], None],
        run: str | None = None,
        least: Mapping[Key, Traffic] = MappingProxyType({}),
    ) -> None:
        """Makes a transaction with what is not in the database yet, of one run or of all.

        If the transaction fails, the bytes wait for the next one, and so does what it was to count at `least`. A caller
        that is cancelled leaves the transaction to the database's thread, which ends it in either way.

        Raises:
            FedpeftError: If it fails.
        """
        taken: dict[Key, Traffic] = {}
        for each in list(self._pending) if run is None else (run,):
            taken.update(self._pending.pop(each, {}))
        made = store.begin(transaction, taken)
        made.add_done_callback(partial(self._take_back, taken, least))
        await ended(made)

    def _take_back(self, taken: Mapping[Key, Traffic], least: Mapping[Key, Traffic], made: asyncio.Task[None]) -> None:
        """Keeps the bytes of a transaction that failed."""
        if not succeeded(made):
            for key, traffic in taken.items():
                self._add(key, traffic)
            for key, wanted in least.items():
                known = self._least.get(key, Traffic())
                self._least[key] = known.at_least(wanted.payload_up, wanted.payload_down)

    def pending(self, run: str) -> dict[tuple[int, str], Traffic]:
        """Returns what is not in the database yet for one run, by (round number, client).

        A caller that adds it to what it reads asks right before the reading, with no `await` between, as in the
        preparation of `Store.read_prepared`: a reading sees what was written by the transactions that were asked for
        before it, and by no other, so each byte is then either here or there.
        """
        return {(number, client): traffic for (_, number, client), traffic in self._pending.get(run, {}).items()}

    def show_as_they_pass(self, run: str) -> None:
        """Has the gauges of a run show bytes in the round in progress, whose tickets may be older than that."""
        self._lasting.add(run)

    def resume(self, run: str, number: int, current: Traffic, last: Traffic) -> None:
        """Sets the gauges of the round in progress, `number`, and of the one before to what the database has."""
        known = {number: _both(current), number - 1: _both(last)}
        self._rounds[run] = _Rounds(self._metrics, run, number, known, lasting=run in self._lasting)

    def round_committed(self, run: str, number: int) -> None:
        """Makes a round the last one, and the one after it the one in progress."""
        self._rounds_of(run).go_on(number + 1)

    def forget(self, run: str) -> None:
        """Forgets a run that was deleted."""
        self._rounds.pop(run, None)
        self._lasting.discard(run)
        for direction in DIRECTIONS:
            self._wire.pop((run, direction), None)

    def _rounds_of(self, run: str) -> _Rounds:
        if run not in self._rounds:
            self._rounds[run] = _Rounds(self._metrics, run, 1, lasting=run in self._lasting)
        return self._rounds[run]

    def _settle(self, call: Call, key: Key, *, training: bool) -> None:
        call.key, call.training = key, training
        for direction, size in call.unbooked.items():
            if size:
                self._book_wire(key, training, direction, size)
        call.unbooked = {"up": 0, "down": 0}

    def _book_wire(self, key: Key, training: bool, direction: Direction, size_bytes: int) -> None:
        run, number, _ = key
        if (run, direction) not in self._wire:
            self._wire[run, direction] = self._metrics.wire_bytes.labels(run, direction)
        self._wire[run, direction].inc(size_bytes)
        if training:
            self._rounds_of(run).add(number, direction, size_bytes)
            up, down = (size_bytes, 0) if direction == "up" else (0, size_bytes)
            self._add(key, Traffic(up, down, 0, 0))

    def _add(self, key: Key, traffic: Traffic) -> None:
        pending = self._pending.setdefault(key[0], {})
        pending[key] = pending[key] + traffic if key in pending else traffic


class _Rounds:
    """Wire bytes of a run's round in progress and of the one before, which may still get what comes too late.

    Its series are looked up once: by their labels that takes longer than to count a message.

    Args:
        metrics: Those that show both rounds.
        run: The run's id.
        number: The round in progress.
        known: Known bytes of both, by number and direction.
        lasting: True if tickets outlive their rounds: then all bytes are shown in the round in progress.
    """

    def __init__(
        self,
        metrics: Metrics,
        run: str,
        number: int,
        known: Mapping[int, dict[Direction, int]] = MappingProxyType({}),
        *,
        lasting: bool = False,
    ) -> None:
        self._lasting = lasting
        self._number = number
        self._sums = dict(known)
        self._current = {d: metrics.round_bytes.labels(run, d) for d in DIRECTIONS}
        self._last = {d: metrics.last_round_bytes.labels(run, d) for d in DIRECTIONS}
        self.go_on(number)

    def add(self, number: int, direction: Direction, size_bytes: int) -> None:
        """Adds bytes to a round; those of others no gauge shows."""
        number = self._number if self._lasting else number
        shown = {self._number: self._current, self._number - 1: self._last}.get(number)
        if shown is not None:
            self._sums[number][direction] += size_bytes
            shown[direction].set(self._sums[number][direction])

    def go_on(self, number: int) -> None:
        """Makes a round the one in progress."""
        self._number = number
        self._sums = {n: self._sums.get(n, {"up": 0, "down": 0}) for n in (number, number - 1)}
        for n, gauges in ((number, self._current), (number - 1, self._last)):
            for direction, gauge in gauges.items():
                gauge.set(self._sums[n][direction])


def _both(traffic: Traffic) -> dict[Direction, int]:
    return {"up": traffic.wire_up, "down": traffic.wire_down}
