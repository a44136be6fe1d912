"""A client in another language, written from the protos alone, takes part as this project's own does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedpeft import seeds
from fedpeft.adapters import payload, updates
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.adapters.spec import TensorRole as TensorRole
from fedpeft.config import CodecConfig
from fedpeft.v1 import run_pb2

from ..server.conftest import Arrays, Daemon, config
from ..server.secured import Federation
from .conftest import Node, NodeClient, Refused

SPEC = AdapterSpec.of(
    "lora",
    [
        TensorSpec("blocks.0.down", (40, 3), (TensorRole.SENT, TensorRole.FROZEN)),
        TensorSpec("blocks.0.up", (3, 40)),
        TensorSpec("head.bias", (7,), (TensorRole.LOCAL,)),
        TensorSpec("head.weight", (7, 40)),
    ],
)
CODECS: dict[str, dict[str, object]] = {
    "float32": {},
    "float16": {"up": "float16", "down": "bfloat16"},
    "bfloat16": {"up": "bfloat16", "down": "float16"},
    "int8": {"up": "int8", "down": "int8"},
    "sparse int8": {"up": "sparse", "density": 0.3, "values": "int8"},
    "uniform": {"up": "uniform4"},
    "eden": {"up": "eden2", "down": "bfloat16"},
    "sparse gaps": {"up": "sparse", "density": 0.03, "values": "float16"},
    "sparse mask": {"up": "sparse", "density": 0.4, "values": "bfloat16"},
    "sparse whole": {"up": "sparse", "density": 1.0},
    "sparse without error feedback": {"up": "sparse", "density": 0.05, "error_feedback": False},
}


def first_version() -> Arrays:
    generator = np.random.default_rng(5)
    return {t.name: generator.normal(0, 0.3, t.shape).astype(np.float32) for t in SPEC.shared}


def trained(base: Arrays, number: int, salt: int) -> Arrays:
    """Returns the change that `train` of client.js makes of a version in round `number`."""
    changes = {}
    for spec in SPEC.sent(number):
        places = np.arange(spec.size).reshape(spec.shape)
        steps = (((places * 37 + number * 11 + salt) % 101 - 50) / 97).astype(np.float32)
        changes[spec.name] = (base[spec.name] + steps) - base[spec.name]
    return changes


def fold(base: Arrays, changes: list[Arrays], examples: list[int]) -> Arrays:
    """Returns the next version, by the formula of FedAvg in float64."""
    total = float(sum(examples))
    folded = dict(base)
    for name in changes[0]:
        mean = np.zeros(base[name].shape)
        for change, weight in zip(changes, examples, strict=True):
            mean += change[name].astype(np.float64) * weight
        folded[name] = (base[name].astype(np.float64) + mean / total).astype(np.float32)
    return folded


def travelled(base: Arrays, encoding: str) -> Arrays:
    """Returns a version as clients receive it."""
    manifest, data = payload.encode(base, SPEC.shared, encoding)
    return payload.decode(manifest, memoryview(data))


@pytest.mark.parametrize("case", CODECS)
async def test_two_clients_hold_a_run_to_its_end(daemon: Daemon, node: Node, case: str) -> None:
    codec = CodecConfig.model_validate(CODECS[case])
    run = await daemon.create(
        config(rounds={"count": 3, "clients": 2}, peft={"method": "lora"}, codec=CODECS[case]), SPEC, first_version()
    )
    salts, examples = (3, 58), (7, 300)
    clients = [await node(name, daemon) for name in ("a", "b")]
    lives = []
    for client, salt, many in zip(clients, salts, examples, strict=True):
        await client("register")
        lives.append(client("live", salt=salt, examples=many))
    said = await asyncio.gather(*lives)
    base, residuals = first_version(), [None, None]
    for number in (1, 2, 3):
        changes = []
        start = travelled(base, codec.down)
        for i, salt in enumerate(salts):
            update = said[i]["updates"][number - 1]
            seed = seeds.training(0, number, "ab"[i])
            mine = updates.prepare(trained(start, number, salt), residuals[i], SPEC.sent(number), codec, (), seed)
            assert update["payload"] == mine.payload.hex()
            assert update["sha256"] == mine.manifest.sha256.hex()
            assert update["settings"]["epochs"] == 1, "the default is said"
            residuals[i] = mine.residual_if_counted
            changes.append(payload.decode(mine.manifest, memoryview(mine.payload)))
        base = fold(base, changes, list(examples))
    done = await daemon.run(run.id)
    assert (done.state, done.version) == (run_pb2.RUN_STATE_COMPLETED, 3)
    found = await daemon.adapter(run.id, 3)
    want = travelled(base, codec.down)
    assert found.keys() == want.keys()
    assert all((found[name] == want[name]).all() for name in want)
    for i, residual in enumerate(residuals):
        left = {name: values for name, values in said[i]["residual"].items() if any(values)}
        assert left == {name: values.reshape(-1).tolist() for name, values in residual.items()}
    rounds = await daemon.rounds(run.id)
    means = [3.5 * 7 / 307 + 58.5 * 300 / 307] * 3
    assert [r.metrics["train_loss"] for r in rounds] == pytest.approx(means)


async def ticket(daemon: Daemon, node: Node, **codec: object) -> tuple[run_pb2.Run, NodeClient, dict[str, Any]]:
    """Returns a run of one client, and that client with a ticket and a trained update."""
    run = await daemon.create(
        config(rounds={"count": 2, "clients": 1}, peft={"method": "lora"}, codec=codec), SPEC, first_version()
    )
    client = await node("a", daemon)
    await client("register")
    await client("task")
    return run, client, await client("train", salt=3)


@pytest.mark.parametrize("up", ["float32", "sparse"])
async def test_an_upload_goes_on_where_it_was_cut(daemon: Daemon, node: Node, up: str) -> None:
    run, client, update = await ticket(daemon, node, up=up)
    size = int(update["manifest"]["payload_bytes"])
    with pytest.raises(Refused, match="CANCELLED"):
        await client("push", cut=size // 2, chunk=50)
    held = await client("status")
    assert (held["state"], held["committed_bytes"]) == ("TICKET_STATE_ISSUED", str(size // 2))
    with pytest.raises(Refused) as ended:
        await client("push", end=size // 2 + 10)
    assert (ended.value.code, ended.value.reason) == ("INVALID_ARGUMENT", "UPLOAD_INCOMPLETE")
    receipt = await client("push")
    assert (receipt["from"], receipt["sha256"]) == (size // 2 + 10, update["manifest"]["sha256"])
    again = await client("push")
    assert again["received_at"] == receipt["received_at"], "a repetition gives the same receipt"
    assert (await client("status"))["receipt"]["sha256"] == receipt["sha256"]
    await daemon.until(run.id, lambda r: r.version == 1)


async def test_a_pull_goes_on_where_it_was_broken_off(daemon: Daemon, node: Node) -> None:
    run = await daemon.create(config(peft={"method": "lora"}), SPEC, first_version())
    client = await node("a", daemon)
    await client("register")
    got = await client("pull", run=run.id, version=0, broken_at=333)
    assert got["arrays"] == {name: values.reshape(-1).tolist() for name, values in first_version().items()}
    assert (got["up_to_date"], got["again"]) == (True, 0), "what is held is not sent"


async def test_wrong_headers_cost_nothing_and_a_wrong_payload_the_ticket(daemon: Daemon, node: Node) -> None:
    run, client, update = await ticket(daemon, node)
    manifest = update["manifest"]
    first, *others = manifest["tensors"]
    wrong_headers: dict[str, tuple[dict[str, object], str, str]] = {
        "another encoding": (
            {"manifest": {**manifest, "tensors": [{**first, "encoding": "float16"}, *others]}},
            "MANIFEST_INVALID",
            "header.manifest.tensors[0].encoding",
        ),
        "a tensor too few": (
            {"manifest": {**manifest, "tensors": others}},
            "MANIFEST_INVALID",
            "header.manifest.tensors",
        ),
        "no examples": ({"examples": 0}, "EXAMPLES_INVALID", "header.examples"),
        "more than declared": ({"examples": 1001}, "EXAMPLES_INVALID", "header.examples"),
        "a nameless figure": ({"metrics": {"": 1.0}}, "METRICS_INVALID", "header.metrics[]"),
    }
    for header, reason, field in wrong_headers.values():
        with pytest.raises(Refused) as refused:
            await client("push", header=header)
        found = refused.value
        assert (found.code, found.reason, found.fields) == ("INVALID_ARGUMENT", reason, [field])
        assert (await client("status"))["state"] == "TICKET_STATE_ISSUED"
    with pytest.raises(Refused) as refused:
        await client("push", payload="00" * int(manifest["payload_bytes"]))
    assert (refused.value.code, refused.value.reason) == ("DATA_LOSS", "CHECKSUM_MISMATCH")
    assert (await client("status"))["committed_bytes"] == "0", "the upload starts over"
    with pytest.raises(Refused) as refused:
        await client("status", sha256="00" * 20)
    assert (refused.value.reason, refused.value.fields) == ("DIGEST_INVALID", ["sha256"])
    assert (await client("push"))["sha256"] == manifest["sha256"]
    await daemon.until(run.id, lambda r: r.version == 1)
    await client("task")
    await client("train", salt=3)
    bad = bytes(4 * (sum(t.size for t in SPEC.sent(2)) - 1)) + np.float32(np.nan).tobytes()
    with pytest.raises(Refused) as refused:
        await client("push", payload=bad.hex(), rehash=True)
    assert (refused.value.reason, refused.value.fields) == ("PAYLOAD_INVALID", ["header.manifest.tensors[1]"])
    held = await client("status")
    assert held["state"] == "TICKET_STATE_REFUSED"
    assert held["reason"].startswith("PAYLOAD_INVALID: ") and "head.weight: value 279 is not finite" in held["reason"]


async def test_it_withdraws_and_the_round_goes_on_without_it(daemon: Daemon, node: Node) -> None:
    run = await daemon.create(
        config(rounds={"count": 1, "clients": 2, "quorum": 1}, peft={"method": "lora"}), SPEC, first_version()
    )
    one, other = await node("a", daemon), await node("b", daemon)
    await asyncio.gather(one("register"), other("register"))
    await asyncio.gather(one("task"), other("task"))
    assert (await one("withdraw", reason="no power"))["state"] == "TICKET_STATE_WITHDRAWN"
    held = await one("status", sha256="")
    assert (held["state"], held["reason"]) == ("TICKET_STATE_WITHDRAWN", "no power")
    await other("train", salt=1)
    await other("push")
    done = await daemon.until(run.id, lambda r: r.version == 1)
    assert done.state == run_pb2.RUN_STATE_COMPLETED
    with pytest.raises(Refused, match="TICKET_CLOSED"):
        await one("train", salt=1)
        await one("push")


async def test_it_scores_a_version(daemon: Daemon, node: Node) -> None:
    run = await daemon.create(config(peft={"method": "lora"}), SPEC, first_version())
    client = await node("judge", daemon)
    await client("register", role="CLIENT_ROLE_EVALUATOR")
    with pytest.raises(Refused) as refused:
        await client("score", metrics={"accuracy": 7})
    assert (refused.value.reason, refused.value.fields) == ("METRICS_INVALID", ["metrics[accuracy]"])
    assert (await client("score"))["version"] == 0
    values = sum(tensor.size for tensor in SPEC.shared)
    assert dict((await daemon.run(run.id)).initial_metrics) == {"accuracy": 0.25, "examples": values}


async def test_who_may_not_speak_is_told_why(daemon: Daemon, node: Node) -> None:
    client = await node("a", daemon)
    with pytest.raises(Refused, match="FAILED_PRECONDITION NOT_REGISTERED"):
        await client("task")
    with pytest.raises(Refused, match="upgrade the client"):
        await client("register", min_protocol=0, max_protocol=0)
    await client("register")
    with pytest.raises(Refused, match="ALREADY_EXISTS CLIENT_ID_IN_USE"):
        await (await node("a", daemon))("register")
    with pytest.raises(Refused, match="UNAUTHENTICATED CLIENT_ID_INVALID"):
        await (await node("a/b", daemon))("register")


async def test_it_enrols_with_a_token_and_holds_a_run_over_tls(secured: Federation, node: Node) -> None:
    operator = secured.daemon(secured.operators())
    run = await operator.create(
        config(rounds={"count": 1, "clients": 1}, peft={"method": "lora"}), SPEC, first_version()
    )
    token = await secured.token("site-a")
    client = await node()
    read = await client("token", line=token.encode())
    assert read["secret"] == token.secret.hex()
    here = replace(token, server=secured.address, enrollment=secured.enrollment)  # the name in it may not resolve here
    answer = await client("enrol", token=here.encode(), at=secured.address)
    assert answer["server"] == token.server
    await client("register")
    life = await client("live", salt=3, examples=10)
    assert len(life["updates"]) == 1
    done = await operator.run(run.id)
    assert (done.state, done.version) == (run_pb2.RUN_STATE_COMPLETED, 1)
    (enrolled,) = [e for e in await secured.audit() if e.action == "identity.enrolled"]
    assert enrolled.object == "client site-a"
    with pytest.raises(Refused, match="TOKEN_USED"):
        await (await node())("enrol", token=here.encode())
