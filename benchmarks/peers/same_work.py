"""The work of every simulator: a small ViT under bias tuning, clients with images of noise, plain averaging.

Imported in the environments of the peers too, so it needs torch, timm and NumPy only. A case prints a line for each
round that ends, with the time since its process began; `simulators.py` reads them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import cache

import numpy as np
import timm
import torch
from torch import nn
from torch.nn import functional

CLASSES, IMAGES, SIDE, DEPTH, BATCH = 10, 48, 64, 4, 16
RATE, MOMENTUM, DECAY = 0.01, 0.9, 1e-4
CLIENTS, ROUNDS = (int(os.environ.get(name, "8")) for name in ("CLIENTS", "ROUNDS"))


def model() -> nn.Module:
    """Returns the model; biases and head require gradients, nothing else does."""
    torch.manual_seed(0)
    made: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=SIDE, depth=DEPTH, num_classes=CLASSES
    )
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name.startswith("head."))
    return made


def tuned(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that are trained and sent."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def pixels(client: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a client's images uint8[48, 64, 64, 3] and labels int64[48]."""
    draw = np.random.Generator(np.random.PCG64(client))
    return draw.integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8), np.arange(IMAGES) % CLASSES


@cache
def tensors(client: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a client's inputs float32[48, 3, 64, 64], normalised, and labels."""
    images, labels = pixels(client)
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5, torch.from_numpy(labels)


def optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns a new optimizer."""
    return torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, nesterov=True)


def train(module: nn.Module, client: int) -> None:
    """Trains one epoch in batches."""
    inputs, labels = tensors(client)
    steps = optimizer(iter(tuned(module).values()))
    for rows in torch.randperm(len(inputs)).split(BATCH):
        loss = functional.cross_entropy(module(inputs[rows]), labels[rows])
        steps.zero_grad()
        loss.backward()
        steps.step()


def ended(number: int) -> None:
    """Says that a round has ended."""
    print(json.dumps({"round": number, "at": time.time()}), flush=True)
