"""Decisions and views of a site's owner, over the client as a process: policy, ledger, metrics."""

from __future__ import annotations

import asyncio
import json
import resource
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedpeft.config import TrainingConfig
from fedpeft.errors import RefusedByPolicy
from fedpeft.process import logs
from fedpeft_client.__main__ import run
from fedpeft_client.egress.entries import EgressEntry, Kind
from fedpeft_client.egress.log import EgressLog
from fedpeft_client.owner import limits
from fedpeft_client.owner.limits import Conditions, Limits
from fedpeft_client.owner.metrics import Metrics, State
from fedpeft_client.owner.policy import Policy
from fedpeft_client.timing import TIMING

from ...ports import free_port
from ..conftest import StartClient, tiny_run, until
from ..federation import Federation

POLICY = """
[runs]
names = ["run", "emoji*"]
[model]
weights_folders = ["/srv/secret-place"]
[training]
max_steps = 5
[data]
min_examples = 10
"""


def scraped(port: int) -> dict[str, float]:
    """Returns every series of a client."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (li.rsplit(" ", 1) for li in lines if not li.startswith("#"))}


def ledger_of(state: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    assert run(["ledger", "--state-dir", str(state), "--json"]) == 0
    transfers: list[dict[str, object]] = json.loads(capsys.readouterr().out)["transfers"]
    return transfers


@pytest.mark.timeout(240)
async def test_a_server_that_offers_little_and_asks_for_much_is_refused_in_words_and_its_owner_sees_it(
    federation: Federation, start_client: StartClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, port = tmp_path / "site-a", free_port()
    state.mkdir()
    (state / "policy.toml").write_text(POLICY)
    federation.run = tiny_run()
    unwanted = tiny_run(training={"steps": 50})
    unwanted.id = "run-000000000002"
    federation.others = [unwanted]
    federation.ask_for = TrainingConfig(steps=50, batch_size=4)
    soon = {"longest_pause_s": 0.5, "first_hold_s": 0.5, "longest_hold_s": 1.0}
    client = await start_client("--metrics", f"127.0.0.1:{port}", timing=soon)
    await until(lambda: federation.withdrawn, client.text)
    assert client.events("the policy of this site applies")[0]["training.max_steps"] == 5
    assert federation.declines == [("site-a", unwanted.id, ["the server asks for 50 steps; its owner allows 5"])]
    assert federation.withdrawn[0].reason == "REFUSED_BY_POLICY: the server asks for 50 steps; its owner allows 5"
    assert not federation.pushes and not client.events("training begins")

    federation.ask_for = None
    await until(lambda: federation.run and federation.run.finished, client.text)
    (counted,) = (ticket for ticket in federation.run.tickets.values() if ticket.header)
    assert counted.header is not None
    sent = {tensor.name for tensor in counted.header.manifest.tensors}
    assert sent == {tensor.name for tensor in federation.run.spec.sent(1)}, "what the offer named, and nothing else"
    assert counted.header.metrics["images_per_second"] > 0 and "gpu_memory_bytes" not in counted.header.metrics

    await until(lambda: scraped(port).get('fedpeft_client_state{state="waiting"}') == 1, client.text)
    series = scraped(port)
    label = f'{{run="{federation.run.id}"}}'
    assert series[f'fedpeft_client_updates_total{{outcome="counted",run="{federation.run.id}"}}'] == 1
    assert series[f"fedpeft_client_rounds_total{label}"] == 1 and series[f"fedpeft_client_examples{label}"] == 12
    assert series[f"fedpeft_client_training_images_per_second{label}"] > 0
    assert series['fedpeft_client_payload_bytes_total{direction="up"}'] == counted.header.manifest.payload_bytes
    wire = series['fedpeft_client_wire_bytes_total{direction="up"}']
    assert wire > counted.header.manifest.payload_bytes
    assert series['fedpeft_client_declines_total{reason="REFUSED_BY_POLICY"}'] == 1
    assert (
        series['fedpeft_client_memory_bytes{process="worker"}'] > series['fedpeft_client_memory_bytes{process="agent"}']
    )
    assert not any("gpu" in name or "site-a" in name or "round=" in name for name in series)

    await client.kill()
    booked = ledger_of(state, capsys)
    kinds = [each["kind"] for each in booked]
    assert kinds[0] == "registration" and {"questions", "answer", "withdrawal", "update"} <= set(kinds)
    words = json.dumps([each["said"] for each in booked])
    assert "its owner allows 5" in words and "/srv/secret-place" not in words
    told = sum(int(str(each["wire_bytes"])) for each in booked)
    assert told >= federation.arrivals.wire_bytes >= wire, "the ledger never tells less than what left"


@pytest.mark.usefixtures("preloaded")
async def test_a_ticket_that_cannot_be_booked_as_given_back_ends_the_client_with_the_reason(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    state = tmp_path / "site-a"
    state.mkdir()
    (state / "policy.toml").write_text(POLICY)
    federation.run = tiny_run(rounds={"clients": 2})
    federation.ask_for = TrainingConfig(steps=5000, batch_size=4)  # so that no update is written meanwhile
    client = await start_client()
    await until(lambda: len(federation.awaited) >= 2, client.text)
    size = (state / "ledger.jsonl").stat().st_size
    resource.prlimit(client.pid, resource.RLIMIT_FSIZE, (size, size))  # as a full disk: it takes no byte more
    enough = federation.run.config.rounds.model_copy(update={"clients": 1})
    federation.run.config = federation.run.config.model_copy(update={"rounds": enough})
    assert await client.ended() == 1
    assert "cannot write the ledger" in client.text[-1] and "nothing leaves this device without it" in client.text[-1]
    levels = [line["level"] for line in client.events("ticket is given up")]
    assert levels == ["warning"] and not client.events("the ticket is gone already")
    assert not federation.withdrawn


@pytest.mark.usefixtures("preloaded")
async def test_what_the_file_system_refuses_ends_the_client_with_a_sentence(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    state = tmp_path / "site-a"
    (state / "settled-counted@run-1").mkdir(parents=True)  # as a kill while it was settled leaves it
    (state / "runs").touch()
    client = await start_client()
    assert await client.ended() == 1
    said = f"cannot use state directory {state}: Not a directory; check its folder and the permissions"
    assert client.text[-1] == f"fedpeft-client: {said}\n"


@pytest.mark.usefixtures("preloaded")
@pytest.mark.timeout(240)
async def test_what_was_trained_under_another_policy_is_not_sent(
    federation: Federation, start_client: StartClient, tmp_path: Path
) -> None:
    federation.run = tiny_run("full")
    federation.chunk_pause_s = 0.3
    client = await start_client("--once")
    await until(lambda: federation.pushes and federation.pushes[0].received >= 100_000, client.text)
    await client.kill()
    policy = tmp_path / "mine.toml"
    policy.write_text('[peft]\nmethods = ["bias"]\n')
    again = await start_client("--once", "--policy", str(policy))
    assert await again.ended() == 4, "".join(again.text)
    assert len(federation.pushes) == 1 and not federation.run.finished
    assert "the policy of this site changed" in federation.withdrawn[0].reason
    assert federation.declines == [("site-a", federation.run.id, ["its owner does not allow the PEFT method 'full'"])]


async def test_a_policy_that_is_named_and_not_there_stops_the_client(start_client: StartClient, tmp_path: Path) -> None:
    client = await start_client("--policy", str(tmp_path / "nowhere.toml"))
    assert await client.ended() == 2
    assert "nowhere.toml: No such file or directory; nothing is done without it" in "".join(client.text)


class Weather:
    """A machine whose temperature the test sets."""

    temperature_c = 20.0

    def look(self) -> Conditions:
        return Conditions(limits.conditions().now, None, self.temperature_c)


LimitsOf = Callable[[Policy, Weather], Limits]


@pytest.fixture
def limits_of(tmp_path: Path) -> LimitsOf:
    timing = replace(TIMING, limits_check_s=0.02)
    egress_log = EgressLog(tmp_path, "s:1")
    with egress_log.record(EgressEntry(Kind.UPDATE, 900, {}, "run-1")):
        egress_log.sending(900)
    return lambda policy, weather: Limits(
        policy, egress_log, Metrics(), logs.logger(client="a"), weather.look, timing=timing
    )


async def test_training_ends_when_it_gets_too_hot_and_goes_on_when_it_is_cool_again(limits_of: LimitsOf) -> None:
    weather = Weather()
    here = limits_of(Policy.model_validate({"times": {"max_temperature_c": 80}}), weather)
    assert await here.while_permitted(asyncio.sleep(0.05, "trained")) == "trained"
    training = asyncio.create_task(here.while_permitted(asyncio.sleep(60)))
    await asyncio.sleep(0.05)
    assert not training.done()
    weather.temperature_c = 81
    with pytest.raises(RefusedByPolicy, match="hotter than its owner allows"):
        await training
    resting = asyncio.create_task(here.permit())
    await asyncio.sleep(0.05)
    assert not resting.done()
    weather.temperature_c = 79
    await asyncio.wait_for(resting, 5)


async def test_the_bytes_of_a_day_are_kept(limits_of: LimitsOf) -> None:
    here = limits_of(Policy.model_validate({"transfer": {"max_bytes_a_day": 1000}}), Weather())
    await asyncio.wait_for(here.permit(100), 5)
    stop = here.against(101)
    assert stop is not None and stop.text == "the bytes that its owner allows a day are used up"
    upload = asyncio.create_task(here.permit_upload(101))
    await asyncio.sleep(0.05)
    assert not upload.done(), "until 24 hours after the last one"
    upload.cancel()


async def test_once_does_not_wait_for_what_is_not_allowed_now(tmp_path: Path) -> None:
    weather = Weather()
    weather.temperature_c = 81
    policy = Policy.model_validate({"times": {"max_temperature_c": 80}})
    here = Limits(policy, EgressLog(tmp_path, "s:1"), Metrics(), logs.logger(client="a"), weather.look, waits=False)
    with pytest.raises(RefusedByPolicy, match=r"hotter than its owner allows; start it again after .* without --once"):
        await asyncio.wait_for(here.permit(), 5)
    weather.temperature_c = 20
    await asyncio.wait_for(here.permit(), 5)


def test_states_are_shown_one_at_a_time() -> None:
    metrics = Metrics()
    metrics.enter(State.WAITING)
    with metrics.during(State.TRAINING):
        assert metrics.registry.get_sample_value("fedpeft_client_state", {"state": "training"}) == 1
        assert metrics.registry.get_sample_value("fedpeft_client_state", {"state": "waiting"}) == 0
    assert metrics.registry.get_sample_value("fedpeft_client_state", {"state": "waiting"}) == 1
