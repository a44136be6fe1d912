"""The times that a daemon writes or shows are by the database's clock, though its machine's clock is another."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import timedelta

import sqlalchemy as sa
from structlog.testing import capture_logs

from fedpeft.errors import Unavailable
from fedpeft.v1 import access_service_pb2 as access
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import run_pb2
from fedpeft_server.store import tables
from fedpeft_server.store.store import Store

from .conftest import Daemon, config, fault, filled
from .secured import Federation

AHEAD_S = 100_000.0
"""Seconds by which the database's clock is ahead of the machine's."""
_NOT_BY_IT = {"identities.issued_at"}
"""A certificate begins and ends by the machine's clock: those it is shown to hold it against theirs."""


async def _ahead() -> float:
    return time.time() + AHEAD_S


async def times(store: Store) -> dict[str, list[float]]:
    """Returns the times in the database, seconds since the epoch, by table and column."""
    return await store.transact(lambda: _times(store.db.transactions.engine))  # the connection is that of its thread


def _times(database: sa.Engine) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    with database.connect() as connection:
        for table in tables.metadata.sorted_tables:
            for column in table.columns:
                name = f"{table.name}.{column.name}"
                if column.name.endswith(("at", "_seen")) and column.name != "expires_at" and name not in _NOT_BY_IT:
                    values = connection.execute(sa.select(column).where(column.is_not(None))).scalars()
                    if written := [float(value) for value in values if value]:
                        found[name] = written
    return found


async def test_a_run_is_dated_by_it(daemon: Daemon) -> None:
    start = (await times(daemon.server.store))["audit.at"]
    await daemon.server.store.clock.set(_ahead)
    began = await _ahead()
    run = (await daemon.create(config(rounds={"count": 1, "clients": 2, "deadline_s": 300.0}))).id
    a, b = await daemon.clients("a", "b")
    given, other = await asyncio.gather(a.task(), b.task())
    left = re.search(r"(\d+) s to the deadline", (await daemon.run(run)).reason)
    assert left is not None and 290 < int(left[1]) <= 300
    await a.push(given.ticket, filled(1.0))
    await b.push(other.ticket, filled(1.0))
    await daemon.until(run, lambda r: r.state == run_pb2.RUN_STATE_COMPLETED)
    evaluator = daemon.client("e")
    await evaluator.register(fed.CLIENT_ROLE_EVALUATOR)
    version = (await evaluator.wait()).evaluation.version
    figures = fed.PushEvaluationRequest(run=run, version=version, metrics={"accuracy": 0.5})
    await evaluator.stub.PushEvaluation(figures, metadata=evaluator.metadata)
    version = (await evaluator.wait()).evaluation.version
    failure = fed.PushEvaluationRequest(run=run, version=version, failure="no room")
    await evaluator.stub.PushEvaluation(failure, metadata=evaluator.metadata)

    written = await times(daemon.server.store)
    written["audit.at"] = [at for at in written["audit.at"] if at not in start]
    expected = {"answers.at", "audit.at", "evaluations.at", "failed_evaluations.at", "runs.created_at"}
    expected |= {"rounds.opened_at", "updates.received_at", "versions.created_at"}
    assert expected <= set(written), written.keys()
    wrong = {name: values for name, values in written.items() if not began <= min(values) <= max(values) < began + 60}
    assert not wrong
    for phase in ("open", "aggregating"):
        seconds = daemon.server.metrics.registry.get_sample_value(
            "fedpeft_round_seconds_sum", {"run": run, "phase": phase}
        )
        assert seconds is not None and 0.0 <= seconds < 60.0


async def test_tokens_and_revocations_are_dated_by_it(secured: Federation) -> None:
    await secured.server.store.clock.set(_ahead)
    began = await _ahead()
    token = await secured.token("a", life_s=60)
    await secured.enroll(token)
    revoked = access.RevokeIdentityRequest(role=access.IDENTITY_ROLE_CLIENT, name="a", reason="stolen")
    await secured.access().RevokeIdentity(revoked)
    await secured.token("b", life_s=60)
    written = await times(secured.server.store)
    for name in ("tokens.created_at", "identities.revoked_at"):
        assert began <= max(written[name]) < began + timedelta(minutes=1).total_seconds(), name


async def test_a_machine_whose_clock_is_another_is_told_so_once(daemon: Daemon) -> None:
    clock = daemon.server.store.clock

    async def own() -> float:
        return time.time()

    with capture_logs() as lines:
        for there in (_ahead, _ahead, own, _ahead):
            await clock.set(there)
    assert [(line["log_level"], line["seconds_behind"]) for line in lines] == [("warning", AHEAD_S)] * 2


async def test_who_was_locked_out_in_the_future_of_this_machine_is_not_made_to_wait_for_it(secured: Federation) -> None:
    """A daemon whose clock is right has revoked it; this one's is behind."""
    await secured.server.store.clock.set(_ahead)
    await secured.enroll(await secured.token("a"))
    revoked = access.RevokeIdentityRequest(role=access.IDENTITY_ROLE_CLIENT, name="a", reason="stolen")
    await secured.access().RevokeIdentity(revoked)
    again = await secured.token("a")
    told = await fault(secured.enroll(again))
    assert isinstance(told, Unavailable)
    assert re.search(r"client a was locked out .* 1\d{5} s ahead .* set the clock of the server", told.message)
