"""Daemons on one database that would keep files in different places, or not the same ones."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedpeft.errors import SettingsInvalid, StoreUnavailable
from fedpeft_server.daemons.setup import Setup
from fedpeft_server.settings import Settings
from fedpeft_server.store.blobs.blobs import Blobs
from fedpeft_server.store.notices.notices import Notice, Topic

from ...ports import free_port
from ..conftest import begin_life, config, filled
from .conftest import Federation, task


def settings_of(folder: Path, federation: Federation, changes: Mapping[str, object]) -> Settings:
    """Returns the settings of a daemon that joins, with changes."""
    known = federation.daemons[0].server.settings
    places = {"database": known.database, "blobs": known.blobs, "updates": known.updates}
    listen = {"data_dir": folder, "listen": f"127.0.0.1:{free_port()}", "metrics": "", "drain_s": 1.0}
    return Settings.model_validate({**listen, **places, **changes})


ELSEWHERE: dict[str, tuple[dict[str, object], str]] = {
    "other updates": ({"updates": "{s3}/others"}, r"--updates s3://\S+/others: another server .* has --updates s3"),
    "other versions": ({"blobs": "{s3}/others"}, r"--blobs s3://\S+/others: another server .* has --blobs s3"),
    "versions in a folder": ({"blobs": ""}, r"--data-dir \S+/blobs: another server .* has --blobs s3"),
    "updates here alone": ({"updates": ""}, r"no --updates: another server .* has --updates s3"),
}


@pytest.mark.parametrize("case", ELSEWHERE)
async def test_a_daemon_that_keeps_files_elsewhere_ends_and_the_others_go_on(
    federation: Federation, s3: str, tmp_path: Path, case: str
) -> None:
    """It would find none of the updates that the others received, and ask all clients for them again."""
    changes, said = ELSEWHERE[case]
    named = {name: str(value).format(s3=s3) for name, value in changes.items()}
    run = await federation.daemons[0].create(config(rounds={"count": 2, "clients": 2}))
    a, b = await federation.clients("a", "b")
    given = await asyncio.gather(task(a[0]), task(b[1]))
    await a[0].push(given[0].ticket, filled(1.0))
    parts, end = await begin_life(settings_of(tmp_path / "other", federation, named))
    await asyncio.wait_for(parts.stopping.wait(), 5)
    with pytest.raises(SettingsInvalid, match=said):
        await end()
    assert not parts.store.agreed.is_set(), "it folded nothing"
    await b[1].push(given[1].ticket, filled(1.0))
    ended = await federation.daemons[2].until(run.id, lambda r: r.version == 1)
    assert not ended.reason.startswith("paused")
    assert all(daemon.server.background.healthy for daemon in federation.daemons)


async def test_a_place_may_have_another_name(federation: Federation, s3: str, tmp_path: Path) -> None:
    changes = {"blobs": f"{s3}/versions/"}
    parts, end = await begin_life(settings_of(tmp_path / "other", federation, changes))
    await asyncio.wait_for(parts.store.agreed.wait(), 5)
    await federation.until(lambda daemon: len(daemon.server.presence._setups) == 3)
    assert not parts.stopping.is_set()
    await end()


async def test_daemons_that_keep_other_files_are_told_of(federation: Federation, tmp_path: Path) -> None:
    with capture_logs() as logged:
        changes = {"keep_versions": 2, "keep_versions_every": 5}
        parts, end = await begin_life(settings_of(tmp_path / "other", federation, changes))
        await asyncio.wait_for(parts.store.agreed.wait(), 5)
        await federation.until(lambda daemon: len(daemon.server.presence._setups) == 3)
        await end()
    said = [line for line in logged if "keeps other files" in line["event"]]
    assert len(said) == 6, "each of the three, and the new one of each"
    named = {"--keep-versions 2 --keep-versions-every 5", "no --keep-updates or --keep-versions"}
    assert {line["here"] for line in said} == {line["there"] for line in said} == named


@pytest.mark.timed(setup_retry_s=0.2)
async def test_a_daemon_whose_bucket_refuses_folds_nothing_until_it_answers(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = Blobs.identity

    def refused(self: Blobs) -> str:
        raise StoreUnavailable("the bucket refuses: the key is wrong")

    monkeypatch.setattr(Blobs, "identity", refused)
    with capture_logs() as logged:
        timing = federation.daemons[0].server.timing
        parts, end = await begin_life(settings_of(tmp_path / "other", federation, {}), timing)
        await asyncio.sleep(0.3)
    said = [line for line in logged if line["event"].startswith("no round is folded here")]
    assert said and said[0]["log_level"] == "warning" and "the key is wrong" in said[0]["message"]
    assert not parts.store.agreed.is_set() and not parts.stopping.is_set()
    monkeypatch.setattr(Blobs, "identity", identity)
    await asyncio.wait_for(parts.store.agreed.wait(), 5)
    await end()


def test_a_setup_comes_as_it_was_told() -> None:
    setup = Setup(1_800_000_000.125, (("ab" * 16, "--blobs s3://b/v"), ("cd" * 16, "--updates s3://b/u")), "all")
    (payload,) = Notice("me", Topic.SETUP, tuple(setup.keys())).payloads()
    notice = Notice.parse(payload)
    assert notice is not None and Setup.of(notice.keys) == setup
    assert Setup.of([*notice.keys, ("new", "x", "y", 0.0)]) == setup
    assert setup.other_places(Setup(0.0, setup.places[:1], "")) == [("--updates s3://b/u", "none")]
