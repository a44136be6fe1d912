"""Upkeep: the daemon's repeated work, from writing traffic to removing files, each piece with its interval."""

from __future__ import annotations

import asyncio
from functools import partial

from grpc_health.v1 import health_pb2

from fedpeft_server.parts import Parts, write_activity
from fedpeft_server.store.notices.listener import Listener


class Upkeep:
    """The repeated work of one daemon.

    Args:
        parts: Its parts.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._store = parts.store
        self._timing = parts.timing

    def begin(self) -> None:
        """Begins all of it, under the daemon's `Background`."""
        parts, timing, background = self._parts, self._timing, self._parts.background
        background.every("traffic", timing.traffic_write_s, self._write_activity)
        background.supervise("traffic", self._write_payloads())
        background.every("clients", timing.clients_count_s, self._count_clients)
        background.every("database", timing.database_check_s, self._check_database)
        background.every("certificate", timing.certificate_check_s, parts.refresh.refresh)
        background.every("certificate files", timing.certificate_files_check_s, parts.refresh.take_up)
        background.every("log", timing.refusal_quiet_s, self._log_suppressed)
        background.every("tokens", timing.tokens_purge_s, self._purge_tokens)
        background.every("files", timing.files_retry_s, partial(self._store.fold, self._store.clean))
        background.every("storage", timing.storage_measure_s, self._measure)
        background.supervise("health", self._show_health())
        if self._store.db.is_shared:
            self._begin_following()
        if parts.ports.enrolment:
            background.every("enrolment", timing.enrolment_retry_s, parts.ports.enrolment.run)

    def _begin_following(self) -> None:
        """Begins to follow the other daemons on the database."""
        timing, background, follower = self._timing, self._parts.background, self._parts.follower
        engine, own = self._store.db.transactions.engine, self._store.db.transactions.notices.sender
        listener = Listener(engine, own, timing, follower.heard, follower.began)
        background.supervise("notices", listener.listen())
        background.supervise("notices", follower.follow())
        background.supervise("seats", self._parts.presence.tell())
        background.every("setup", timing.setup_retry_s, self._parts.presence.agree)
        background.every("revisions", timing.revisions_check_s, follower.check_runs)
        background.every("clock", timing.database_check_s, self._store.set_clock)

    async def _write_activity(self) -> None:
        sessions, now = self._parts.sessions, self._store.clock.time()
        await write_activity(self._parts.byte_counter, sessions, self._store)
        if self._store.db.is_shared:  # others write as often
            seen = await self._store.transact(self._store.db.clients_seen, now - 4 * self._timing.traffic_write_s)
            sessions.note_seen(seen)
            await self._parts.runs.show_traffic()

    async def _count_clients(self) -> None:
        waits_elsewhere = self._parts.runs.lobby.waits_elsewhere
        counts = await self._parts.sessions.silences(self._store.clock.time(), waits_elsewhere)
        self._parts.metrics.registered(counts)

    async def _write_payloads(self) -> None:
        """Writes traffic soon after a payload moved: what is not written is lost if the process is killed."""
        byte_counter = self._parts.byte_counter
        while True:
            await byte_counter.moved.wait()
            await asyncio.sleep(self._timing.payload_write_delay_s)
            with self._parts.background.attempt("traffic"):
                await byte_counter.write(self._store)

    async def _check_database(self) -> None:
        await self._store.transact(self._store.db.transactions.probe)

    async def _log_suppressed(self) -> None:
        self._parts.caller_log.log_suppressed()

    async def _purge_tokens(self) -> None:
        before = self._store.clock.time() - self._timing.tokens_kept_s
        await self._store.transact(self._store.db.identities.purge_tokens, before)

    async def _measure(self) -> None:
        """Shows how much is stored, and how much room is kept."""
        for place, size_bytes in (await self._store.fold(self._store.measure)).items():
            self._parts.metrics.stored_bytes.labels(place).set(size_bytes)
        for disk in await self._store.fold(self._store.room.disks):
            self._parts.metrics.disk_spared_bytes.labels(disk.place).set(disk.spared_bytes)

    async def _show_health(self) -> None:
        """Has health checks say whether the background work goes on."""
        background, status = self._parts.background, health_pb2.HealthCheckResponse
        while True:
            await background.changed.wait()
            background.changed.clear()
            well = background.healthy and not self._parts.stopping.is_set()
            await self._parts.health.set("", status.SERVING if well else status.NOT_SERVING)
