"""LoRA in a federation: bytes of a round, and how far each method's version is from the exact mean of its clients.

    python benchmarks/lora_means.py [--rounds N] [--clients N] [--steps N]

A small ViT of random weights; clients with mixtures of classes of their own and unequal numbers of images, trained by
SGD. Updates are encoded and folded as in every run. After each round, with D = s (B A + U V) of a layer, U V being the
residual, if there is one:

    distance = sum of layers |D - sum p_i D_i|^2 / sum of layers |sum p_i D_i - D before|^2

so 0 is the exact mean of what the clients hold, and 1 as far from it as the round went. Bytes are those of a round, of
all clients together, who hold the version before. `loss` is that of the last version over the images of all clients.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.adapters import payload
from fedpeft.adapters.payload import Manifest
from fedpeft.aggregation import UpdateFacts, strategy
from fedpeft.aggregation.low_rank.ranks import cut, limited, of_rank
from fedpeft.config import ModelConfig
from fedpeft.models import backbones
from fedpeft.peft import TunedModel, tune
from fedpeft.rounds.folding.contributions import Contribution
from fedpeft.rounds.folding.fold import fold

MODEL = ModelConfig(name="vit_tiny_patch16_224", weights="none", image_size=32, depth=2, classes=("a", "b", "c", "d"))
WIDTH, RANK, ALPHA, RATE = 192, 8, 16.0, 0.05
DOWN = ".lora_A.weight"
Arrays = Mapping[str, NDArray[np.float32]]
Data = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """A method with its strategy, and the ranks of clients, in turn."""

    title: str
    method: str
    strategy: str
    options: Mapping[str, object] = field(default_factory=dict)
    residual_rank: int = 0
    ranks: Sequence[int] = (RANK,)


ROWS = (
    Row("FedIT", "lora", "fedavg"),
    Row("FFA-LoRA", "ffa_lora", "fedavg"),
    Row("RoLoRA", "rolora", "fedavg"),
    Row("LoRA-FAIR", "lora", "lora_fair"),
    Row("FlexLoRA", "lora", "flexlora"),
    Row("FlexLoRA, balanced", "lora", "flexlora", {"balanced": True}),
    Row("FedEx-LoRA", "lora_residual", "fedex_lora", residual_rank=WIDTH),
    Row("FedEx-LoRA, residual 32", "lora_residual", "fedex_lora", residual_rank=32),
    Row("FLoRA", "lora_residual", "flora", residual_rank=WIDTH),
    Row("FLoRA, residual 32", "lora_residual", "flora", residual_rank=32),
    Row("FLoRA, ranks 2 4 8 8", "lora_residual", "flora", residual_rank=WIDTH, ranks=(2, 4, 8, 8)),
    Row("FlexLoRA, ranks 2 4 8 8", "lora", "flexlora", ranks=(2, 4, 8, 8)),
)


def data_of(client: int) -> Data:
    """Returns a client's images: noise around patterns of its own mixture of the classes."""
    draw = np.random.default_rng([7, client])
    patterns = np.random.default_rng(7).standard_normal((len(MODEL.classes), 3, 32, 32))
    labels = draw.choice(len(MODEL.classes), size=16 + 8 * client, p=draw.dirichlet(np.full(len(MODEL.classes), 0.3)))
    images = patterns[labels] + draw.standard_normal((len(labels), 3, 32, 32))
    return torch.from_numpy(images.astype(np.float32)), torch.from_numpy(labels)


def loss(model: TunedModel, data: Data) -> torch.Tensor:
    """Returns the mean loss."""
    return torch.nn.functional.cross_entropy(model.module(data[0]), data[1])


def trained(model: TunedModel, data: Data, number: int, steps: int) -> dict[str, NDArray[np.float32]]:
    """Returns the tensors after some steps of SGD on all of a client's images, from what the model holds."""
    optimizer = torch.optim.SGD(model.trainable(number).values(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, data).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state()


def held(tensors: Arrays) -> dict[str, NDArray[np.float64]]:
    """Returns D by layer, float64."""
    found = {}
    for layer in (name.removesuffix(DOWN) for name in tensors if name.endswith(DOWN)):
        pairs = [(f"{layer}.lora_B.weight", layer + DOWN), (f"{layer}.residual.up", f"{layer}.residual.down")]
        parts = [tensors[b].astype(float) @ tensors[a].astype(float) for b, a in pairs if b in tensors]
        found[layer] = ALPHA / RANK * np.sum(parts, axis=0)
    return found


def measure(row: Row, data: Sequence[Data], rounds: int, steps: int) -> tuple[float, float, float, float]:
    """Returns bytes up and down of a round, all clients together, the mean distance, and the last loss."""
    options: dict[str, object] = {"rank": RANK, "alpha": ALPHA}
    if row.residual_rank:
        options["residual_rank"] = row.residual_rank
    model = tune(backbones.build(MODEL, 0), row.method, options, 0)
    rule, spec, version = strategy(row.strategy, row.options), model.spec, model.state()
    up = down = distance = 0.0
    for number in range(1, rounds + 1):
        updates, after = [], []
        for client, own in enumerate(data):
            rank = row.ranks[client % len(row.ranks)]
            begin = limited(version, spec.tensors, rank)
            model.load(begin)
            after.append(trained(model, own, number, steps))
            sent = of_rank(spec.sent(number), rank)
            change = cut({t.name: after[-1][t.name] - begin[t.name] for t in sent}, sent)
            updates.append(_contribution(client, len(own[1]), *payload.encode(change, sent, "float32")))
            up += sum(entry.length for entry in updates[-1].manifest.entries)
        down += len(data) * 4 * sum(t.size for t in spec.changed(number - 1, number))
        before, version = version, fold(updates, spec.shared, rule, version, {}).adapter
        distance += _distance(before, after, [len(own[1]) for own in data], version) / rounds
    model.load(version)
    with torch.no_grad():
        every = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
        return up / rounds, down / rounds, distance, float(loss(model, every))


def _contribution(client: int, examples: int, manifest: Manifest, data: bytes) -> Contribution:
    return Contribution(f"client-{client:03}", UpdateFacts(examples), manifest, memoryview(data))


def _distance(before: Arrays, after: Sequence[Arrays], examples: Sequence[int], version: Arrays) -> float:
    shares = np.array(examples) / sum(examples)
    clients, found, old = [held(each) for each in after], held(version), held(before)
    exact = {layer: sum(p * each[layer] for p, each in zip(shares, clients, strict=True)) for layer in found}
    error = sum(float(np.square(found[layer] - exact[layer]).sum()) for layer in found)
    return error / sum(float(np.square(exact[layer] - old[layer]).sum()) for layer in found)


def main() -> None:
    """Prints a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = [data_of(client) for client in range(given.clients)]
    print("| method | bytes up | bytes down | distance | loss |\n|---|---:|---:|---:|---:|")
    for row in ROWS:
        up, down, distance, last = measure(row, data, given.rounds, given.steps)
        print(f"| {row.title} | {up:,.0f} | {down:,.0f} | {distance:.1e} | {last:.3f} |", flush=True)


if __name__ == "__main__":
    main()
