"""Counts bytes where they pass: for Prometheus at once, for each client and round into the database.

Wire bytes are whole serialized messages, counted in the (de)serializers, so that nothing is serialized twice to be
measured. Payload bytes are the encoded tensors inside them.

Every transition of a run (a receipt, a withdrawal, a refusal, a commit...) writes what was counted for the run so far,
in its own transaction; what passes between two transitions is written every few seconds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from fedpeft_server.call import CALL, Call, Direction, Key
from fedpeft_server.metrics import Metrics
from fedpeft_server.store.rows import Traffic
from fedpeft_server.store.store import Store


class Ledger:
    """The bytes that are not in the database yet, and their Prometheus counters."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._pending: dict[Key, Traffic] = {}
        self._round: dict[tuple[str, Direction], int] = defaultdict(int)

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

    async def write(self, store: Store) -> None:
        """Writes what is not in the database yet; what could not be written waits for the next time.

        Raises:
            DiskFull: If there is no room.
            StateInvalid: If the database is out of reach.
        """
        if self._pending:
            with self.handed_out() as traffic:
                await store.call(store.db.add_traffic, traffic)

    @contextmanager
    def handed_out(self, run: str | None = None) -> Iterator[Mapping[Key, Traffic]]:
        """Gives what is not in the database yet, of one run or of all, to the transaction that the block makes.

        If it fails, they wait for the next one. A block that is cancelled has handed its transaction to the database's
        thread, which makes it all the same.
        """
        taken = {key: self._pending.pop(key) for key in list(self._pending) if run in (None, key[0])}
        try:
            yield taken
        except Exception:
            for key, traffic in taken.items():
                self._add(key, traffic)
            raise

    def pending(self, run: str) -> dict[tuple[int, str], Traffic]:
        """Returns what is not in the database yet for one run, by (round number, client).

        A caller that adds it to what it reads asks right before the reading, with no `await` between: transactions are
        made in the order in which they were asked for, so each byte is then either here or there.
        """
        return {(key[1], key[2]): traffic for key, traffic in self._pending.items() if key[0] == run}

    def resume(self, run: str, current: Traffic, last: Traffic) -> None:
        """Sets the gauges of the round in progress and of the last committed one to what the database has."""
        self._round[run, "up"], self._round[run, "down"] = current.wire_up, current.wire_down
        for direction, before in (("up", last.wire_up), ("down", last.wire_down)):
            self._metrics.round_bytes.labels(run, direction).set(self._round[run, cast(Direction, direction)])
            self._metrics.last_round_bytes.labels(run, direction).set(before)

    def round_committed(self, run: str) -> None:
        """Moves the gauges of the round in progress to those of the last round."""
        for direction in ("up", "down"):
            total = self._round.pop((run, direction), 0)
            self._metrics.last_round_bytes.labels(run, direction).set(total)
            self._metrics.round_bytes.labels(run, direction).set(0)

    def _settle(self, call: Call, key: Key, *, training: bool) -> None:
        call.key, call.training = key, training
        for direction, size in call.unbooked.items():
            if size:
                self._book_wire(key, training, direction, size)
        call.unbooked = {"up": 0, "down": 0}

    def _book_wire(self, key: Key, training: bool, direction: Direction, size_bytes: int) -> None:
        run = key[0]
        self._metrics.wire_bytes.labels(run, direction).inc(size_bytes)
        if training:
            self._round[run, direction] += size_bytes
            self._metrics.round_bytes.labels(run, direction).set(self._round[run, direction])
            up, down = (size_bytes, 0) if direction == "up" else (0, size_bytes)
            self._add(key, Traffic(up, down, 0, 0))

    def _add(self, key: Key, traffic: Traffic) -> None:
        self._pending[key] = self._pending[key] + traffic if key in self._pending else traffic
