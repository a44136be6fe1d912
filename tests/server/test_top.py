"""`fedpeft top` over a real server: what stands on the screen, at 80x24 and 160x50, and what its keys do.

`FEDPEFT_WRITE_IMAGES=1 pytest tests/server/test_top.py` writes docs/images/top.svg.
"""

from __future__ import annotations

import asyncio
import os
import pty
import re
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from textual.pilot import Pilot

from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.api import operator_client
from fedpeft.api.operator_client import Connect, OperatorClient
from fedpeft.errors import Draining, PermissionDenied
from fedpeft.v1 import federation_service_pb2 as fed
from fedpeft.v1 import run_pb2
from fedpeft_operator.app import main
from fedpeft_operator.top import feed
from fedpeft_operator.top.app import TopApp

from ..conftest import process_itself
from ..console.federation import Federation
from ..operator.operator_double import Double, a_run, serving
from .conftest import Daemon, StartDaemon, config, filled, zeros

IMAGE = Path(__file__).resolve().parents[2] / "docs" / "images" / "top.svg"
LARGE = AdapterSpec.of("bias", [TensorSpec("head.bias", (42_249,))])
SIZES = [(80, 24), (160, 50)]
TEXT = re.compile(r'<text[^>]* y="([\d.]+)"[^>]*>(.*?)</text>')


@pytest.fixture(autouse=True)
def no_long_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "EVERY_S", 0.1)
    monkeypatch.setattr(feed, "LONGEST_PAUSE_S", 0.5)


def screen(app: TopApp) -> str:
    """Returns the text of the screen, line by line."""
    lines: dict[float, str] = defaultdict(str)
    for y, text in TEXT.findall(app.export_screenshot()):
        lines[float(y)] += unescape(text).replace("\xa0", " ")
    return "\n".join(lines[y] for y in sorted(lines))


async def shows(pilot: Pilot[None], *words: str, without: str = "\0") -> str:
    """Waits until the screen has all these words; returns it."""
    app = pilot.app
    assert isinstance(app, TopApp)
    text = ""
    try:
        async with asyncio.timeout(20):
            while True:
                await pilot.pause(0.05)
                text = screen(app)
                if all(word in text for word in words) and without not in text:
                    return text
    except TimeoutError:
        raise AssertionError(f"{[word for word in words if word not in text]} is not on the screen:\n{text}") from None


@asynccontextmanager
async def top(
    daemon: Daemon, size: tuple[int, int] = (80, 24), *, may_write: bool = True, connect: Connect | None = None
) -> AsyncIterator[Pilot[None]]:
    address = daemon.server.settings.listen
    app = TopApp(connect or partial(OperatorClient, address, attempts=1), address, may_write=may_write)
    async with app.run_test(size=size, notifications=True) as pilot:
        yield pilot


async def a_round_in_progress(daemon: Daemon) -> run_pb2.Run:
    """Two scored rounds; in the third noto's update is there, twemoji's was refused, fxemoji is awaited."""
    settings = config(rounds={"count": 10, "clients": 3, "quorum": 1, "deadline_s": 600})
    settings = settings.model_copy(update={"name": "emoji"})
    async with OperatorClient(daemon.server.settings.listen) as operator:
        run = await operator.create_run(settings, LARGE, "ab" * 32, zeros(LARGE), 16_214_409)
    names = ("fxemoji", "noto", "twemoji")
    clients = dict(zip(names, await daemon.clients(*names), strict=True))
    judge, shy = daemon.client("judge"), daemon.client("shy")
    await judge.register(fed.CLIENT_ROLE_EVALUATOR)
    await shy.register()
    await shy.answer(run.id, "it has no image of the run's classes")
    for number in (1, 2, 3):
        tasks = dict(zip(names, await asyncio.gather(*(c.task() for c in clients.values())), strict=True))
        await judge.stub.PushEvaluation(
            fed.PushEvaluationRequest(
                run=run.id, version=number - 1, metrics={"accuracy": 0.111 * number**1.3, "loss": 2.3 / number}
            ),
            metadata=judge.metadata,
        )
        if number < 3:
            await asyncio.gather(
                *(clients[n].push(tasks[n].ticket, filled(1.0, LARGE), examples=617, spec=LARGE) for n in names)
            )
    await clients["noto"].push(tasks["noto"].ticket, filled(1.0, LARGE), examples=625, spec=LARGE)
    with pytest.raises(Exception, match=r"finite"):
        await clients["twemoji"].push(tasks["twemoji"].ticket, filled(np.nan, LARGE), spec=LARGE)
    return run


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
async def test_a_run_at_a_glance(daemon: Daemon, size: tuple[int, int]) -> None:
    run = await a_round_in_progress(daemon)
    async with top(daemon, size) as pilot:
        text = await shows(pilot, "1 of 3 received", "fxemoji", "value 0 is not finite")
        assert re.search(rf"^ *> +{run.id} +emoji +running +2/10", text, re.M)
        assert "round 3 of 10: waiting > OPEN > aggregating > committed" in text
        assert re.search(r"1 of 3 received(, quorum \d)?, (9 min \d+ s|10 min 0 s) left; waiting for fxemoji", text)
        assert re.search(r"accuracy 11\.1 % ▁.*█ 46\.3 %", text)
        assert "full fine-tuning" in text
        rows = [line.split() for line in text.splitlines()]
        states = {row[0]: row[1] for row in rows if row and row[0] in ("fxemoji", "noto", "twemoji") and len(row) > 5}
        assert states == {"twemoji": "refused", "fxemoji": "awaited", "noto": "received"}
        assert max(map(len, text.splitlines())) <= size[0]
        assert "q Quit" in text and "? Keys" in text
        if size[0] == 160:
            assert re.search(r"shy .* declined: it has no", text), "the clients have room beside the round"
            assert re.search(r"^ *2 +3 +46\.3 % +0\.767", text, re.M), "and the rounds below it"
        await pilot.press("2")
        text = await shows(pilot, "[2 all rounds]", "took")
        assert re.search(r"^ *2 +3 +46\.3 % +0\.767", text, re.M)
        await pilot.press("3")
        await shows(pilot, "[3 clients]", "declined: it has", "evaluator")
        if size == (80, 24) and os.environ.get("FEDPEFT_WRITE_IMAGES"):
            await pilot.press("1")
            await shows(pilot, "[1 this round]")
            IMAGE.parent.mkdir(exist_ok=True)
            image = re.sub(r"@font-face \{.*?\}\s*", "", pilot.app.export_screenshot(title="fedpeft top"), flags=re.S)
            IMAGE.write_text(image, encoding="utf-8")  # without fonts of somebody's server


async def test_a_long_name_takes_no_line_from_the_bytes_on_a_small_terminal(daemon: Daemon) -> None:
    run = await daemon.create(config().model_copy(update={"name": "n" * 64}))
    async with top(daemon, (80, 24)) as pilot:
        text = await shows(pilot, "sent up 0 B", "no version is scored yet")
        assert f"{run.config.name}: " in text


async def test_the_lower_table_is_sorted_by_what_the_key_says(daemon: Daemon) -> None:
    await a_round_in_progress(daemon)

    def order(text: str) -> list[str]:
        return re.findall(r"^ *(fxemoji|noto|twemoji) +(?:refused|awaited|received)", text, re.M)

    async with top(daemon) as pilot:
        assert order(await shows(pilot, "by state", "awaited")) == ["twemoji", "fxemoji", "noto"]
        await pilot.press("s")
        assert order(await shows(pilot, "by client")) == ["fxemoji", "noto", "twemoji"]
        await pilot.press("s")
        assert order(await shows(pilot, "by examples"))[0] == "noto"


async def test_pause_resume_and_stop_ask_first(daemon: Daemon) -> None:
    run = await daemon.create(config())
    async with top(daemon) as pilot:
        await shows(pilot, run.id, "running")
        await pilot.press("p")
        await shows(pilot, f"Pause run ({run.id})?")
        await pilot.press("n")
        await shows(pilot, without="Pause run")
        assert (await daemon.run(run.id)).state == run_pb2.RUN_STATE_RUNNING
        await pilot.press("p")
        await shows(pilot, f"Pause run ({run.id})?")
        await pilot.press("y")
        await shows(pilot, "paused", "PAUSED; round 1")
        assert (await daemon.run(run.id)).reason == "paused in fedpeft top"
        await pilot.press("p")
        await shows(pilot, f"Resume run ({run.id})?")
        await pilot.press("y")
        await shows(pilot, "running", without="PAUSED")
        await pilot.press("x")
        await shows(pilot, "cannot be resumed")
        await pilot.press("y")
        await shows(pilot, "STOPPED at version 0 of 2")
        await pilot.press("x")
        await shows(pilot, "This run has ended")


async def test_who_may_only_look_has_no_such_keys(daemon: Daemon) -> None:
    run = await daemon.create(config())
    async with top(daemon, (100, 30), may_write=False) as pilot:
        text = await shows(pilot, run.id, "read-only")
        assert "x Stop" not in text
        await pilot.press("p", "x")
        assert len(pilot.app.screen_stack) == 1


async def test_the_arrows_choose_a_run_and_the_newest_is_shown_first(daemon: Daemon) -> None:
    first = await daemon.create(config(), request_id="1")
    second = await daemon.create(config(peft={"method": "bias"}, rounds={"count": 7, "clients": 2}), request_id="2")
    async with top(daemon) as pilot:
        await shows(pilot, second.id, "round 1 of 7")
        await pilot.press("down")
        text = await shows(pilot, "round 1 of 2")
        assert re.search(rf"^ *> +{first.id}", text, re.M)


async def test_a_run_that_is_deleted_leaves_the_screen_to_another_one(daemon: Daemon) -> None:
    first = await daemon.create(config(), request_id="1")
    second = await daemon.create(config(rounds={"count": 7, "clients": 2}), request_id="2")
    async with OperatorClient(daemon.server.settings.listen) as operator, top(daemon) as pilot:
        app, seen = pilot.app, []
        assert isinstance(app, TopApp)
        await shows(pilot, second.id, "round 1 of 7")
        await operator.stop(second.id, "enough")
        await shows(pilot, "STOPPED at version 0 of 7")
        changed = app._feed._changed
        app._feed._changed = lambda: seen.append(app._standing(datetime.now(UTC))) or changed()
        await operator.delete(second.id)
        text = await shows(pilot, first.id, "round 1 of 2", without=second.id)
        assert re.search(rf"^ *> +{first.id}", text, re.M)
        await operator.stop(first.id, "enough")
        await operator.delete(first.id)
        await shows(pilot, "No runs yet", without=first.id)
        assert seen and not any("NO CONNECTION" in line for line in seen)


async def test_a_run_that_is_deleted_while_it_is_watched_is_gone_and_nobody_is_let_in_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "FIRST_PAUSE_S", 0.05)
    with serving(Double()) as served:
        served.double.runs = {"run-a": a_run("run-a")}
        app = TopApp(partial(OperatorClient, served.address), served.address)
        async with app.run_test(size=(120, 30)) as pilot:
            served.double.script = [Draining("the server is shutting down")]
            await shows(pilot, "run-a", "running")
            del served.double.runs["run-a"]
            served.double.script = []
            text = await shows(pilot, "No runs yet", without="run-a")
            assert "NO CONNECTION" not in text
            refused = PermissionDenied("operator judith was revoked")
            served.double.failures["ListRuns"] = [refused] * 1000
            text = await shows(pilot, "NOT LET IN: operator judith was revoked")
            assert "NO CONNECTION" not in text
            served.double.failures.clear()
            await shows(pilot, "UTC", without="NOT LET IN")


async def test_looks_take_a_small_part_of_the_time_and_drawings_are_not_one_a_change(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    await daemon.create(config())
    looks, clients = [], OperatorClient.clients

    async def slow(server: OperatorClient) -> object:
        looks.append(time.monotonic())
        await asyncio.sleep(0.2)
        return await clients(server)

    monkeypatch.setattr(OperatorClient, "clients", slow)
    async with top(daemon) as pilot:
        app = pilot.app
        assert isinstance(app, TopApp)
        await _until(lambda: len(looks) == 2, 60)
        assert looks[1] - looks[0] >= 2.0, "ten times what the look took, not EVERY_S"
        drawn, standing = [], TopApp._standing
        monkeypatch.setattr(TopApp, "_standing", lambda app, now: drawn.append(now) or standing(app, now))
        for _ in range(40):
            app._feed._changed()
            await asyncio.sleep(0.01)
        await pilot.pause(0.3)
        assert 2 <= len(drawn) <= 6


async def test_a_server_that_was_away_is_found_again(start: StartDaemon, tmp_path: Path) -> None:
    daemon = await start(tmp_path / "kept")
    run = await daemon.create(config())
    first = where = daemon.server.settings.listen

    def connect() -> OperatorClient:
        return OperatorClient(where, attempts=1)

    async with top(daemon, connect=connect) as pilot:
        await shows(pilot, run.id, "UTC")
        await daemon.end()
        await shows(pilot, f"NO CONNECTION: no FedPEFT server answers at {first}", run.id)
        again = await start(tmp_path / "kept")
        where = again.server.settings.listen
        await again.clients("late-comer")
        text = await shows(pilot, "UTC", "clients: 1 ", without="NO CONNECTION")
        assert re.search(rf"^ *> +{run.id} ", text, re.M), "what was there before is there again"
        await pilot.press("3")
        assert re.search(r"^ *late-comer +trainer", await shows(pilot, "late-comer"), re.M)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of something that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


async def test_before_the_server_has_answered_nothing_is_said_of_it(
    silent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator_client, "LOOK_S", 1.0)
    app = TopApp(partial(OperatorClient, silent), silent)
    async with app.run_test(size=(160, 50)) as pilot:
        first = screen(app)
        assert first.splitlines()[0].split() == ["asking", silent, "..."]
        later = await shows(pilot, f"NO CONNECTION: no FedPEFT server answers at {silent}", f"asking {silent} ...")
    for text in (first, later):
        assert "none yet" not in text
        assert "No runs yet" not in text


async def test_a_server_that_freezes_is_away_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator_client, "LOOK_S", 1.0)
    federation = await asyncio.to_thread(Federation, tmp_path)
    try:
        run = await asyncio.to_thread(federation.create, "kept", 2, 2)
        app = TopApp(partial(OperatorClient, federation.address), federation.address)
        async with app.run_test(size=(80, 24)) as pilot:
            await shows(pilot, run, "UTC")
            os.kill(process_itself(federation.daemon.process.pid), signal.SIGSTOP)
            began = time.monotonic()
            await shows(pilot, f"NO CONNECTION: no FedPEFT server answers at {federation.address}", run)
            assert time.monotonic() - began < 5
            os.kill(process_itself(federation.daemon.process.pid), signal.SIGCONT)
            await shows(pilot, run, "UTC", without="NO CONNECTION")
    finally:
        await asyncio.to_thread(federation.close)


def test_it_does_not_start_where_nothing_answers(
    silent: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(operator_client, "LOOK_S", 1.0)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    with os.fdopen(ours), os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        began = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            main(["--server", silent, "top"])
        assert time.monotonic() - began < 5
    assert f"no FedPEFT server answers at {silent}" in capsys.readouterr().err
    assert ended.value.code == 3


async def test_nothing_yet_and_the_keys(daemon: Daemon) -> None:
    async with top(daemon) as pilot:
        await shows(pilot, "No runs yet", "none yet")
        await pilot.press("s", "p", "question_mark")
        await shows(pilot, "pause or resume the run", "escape  back")
        assert len(pilot.app.screen_stack) == 2, "no dialog asks whether to pause a run that is not there"
        await pilot.press("escape")
        await shows(pilot, without="escape  back")
        assert len(pilot.app.screen_stack) == 1
        await pilot.press("q")
        await _until(lambda: not pilot.app.is_running)
        assert pilot.app.return_code == 0


async def _until(reached: Callable[[], bool], seconds: float = 10) -> None:
    async with asyncio.timeout(seconds):
        while not reached():
            await asyncio.sleep(0.01)
