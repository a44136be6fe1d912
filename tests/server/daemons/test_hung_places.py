"""One daemon's object store hangs: what it hears of the others, and its other runs, wait for nothing of that."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fedpeft.identity.subject import Role, Subject
from fedpeft.v1 import operator_service_pb2 as op
from fedpeft_server.runs import engine
from fedpeft_server.store.notices.notices import Topic
from fedpeft_server.store.store import FOLD_THREADS, VERSION_THREADS, Store

from .. import relayed_calls
from ..conftest import Daemon, config, filled
from .conftest import Federation, task


@contextmanager
def hanging(store: Store) -> Iterator[None]:
    """Has an object store take all threads that may wait for one."""
    answers = threading.Event()
    for pool, number in ((store._folds, FOLD_THREADS), (store._versions, VERSION_THREADS)):
        for _ in range(number):
            pool.submit(answers.wait)
    try:
        yield
    finally:
        answers.set()


@pytest.mark.timed(follow_run_s=0.2)
@pytest.mark.parametrize("news", ["a run is deleted", "versions are removed", "an edge's run is made"])
async def test_a_daemon_whose_bucket_hangs_hears_who_is_revoked(federation: Federation, news: str) -> None:
    one, other, lost = federation.daemons[0], federation.daemons[1], Subject(Role.CLIENT, "lost")
    run = (await one.create()).id
    await federation.until(lambda d: d.server.runs.find(run))
    store = one.server.store
    with hanging(other.server.store):
        if news == "a run is deleted":
            await one.operator.StopRun(op.StopRunRequest(run=run))
            await one.operator.DeleteRun(op.DeleteRunRequest(run=run))
        elif news == "versions are removed":
            await store.transact(store.db.tell, Topic.REMOVED, [(run, 1)])
        else:
            await relayed_calls.make(one, 0, relayed_calls.ones())
        await store.transact(store.db.identities.revoke, lost, time.time(), "stolen", "operator", unseen=True)
        await federation.until(lambda d: d is one or d.server.admission.is_refused(lost))
        assert other.server.background.healthy


async def test_a_run_that_is_busy_keeps_no_other_from_its_clients(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rollback copies a version; where that takes long, rounds of other runs open all the same."""
    goes_on, begun, go_back = threading.Event(), threading.Event(), engine.go_back

    def slow(*arguments: Any) -> Any:
        begun.set()
        goes_on.wait(60)
        return go_back(*arguments)

    monkeypatch.setattr(engine, "go_back", slow)
    busy = (await daemon.create(config(rounds={"count": 3, "clients": 1}))).id
    a, b = await daemon.clients("a", "b")
    await a.push((await task(a)).ticket, filled(1.0))
    await daemon.until(busy, lambda found: found.version == 1)
    goes_back = asyncio.ensure_future(daemon.operator.RollbackRun(op.RollbackRunRequest(run=busy, version=0)))
    await asyncio.to_thread(begun.wait, 20)
    waiting = asyncio.create_task(a.task())
    try:
        async with asyncio.timeout(20):
            while "a" not in daemon.server.runs.matching.ready(busy):
                await asyncio.sleep(0.01)
        other = (await daemon.create(config(rounds={"count": 1, "clients": 1}), request_id="other")).id
        assert (await asyncio.wait_for(b.wait(other), 20)).training.run == other
    finally:
        goes_on.set()
    await goes_back
    assert (await asyncio.wait_for(waiting, 20)).version == 2, "and its own, once it is done"
