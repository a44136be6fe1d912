"""Seeds: everything random derives from (run seed, purpose, names), so a repetition is the same.

The derivation uses the run's `rounds.seed` and never its id, so that a simulation and a daemon agree.
"""

from __future__ import annotations

import hashlib


def derive(seed: int, purpose: str, *names: str | int) -> int:
    """Returns a 63-bit seed that depends on all arguments and on nothing else."""
    text = "\x1f".join([str(seed), purpose, *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def training(seed: int, number: int, client: str) -> int:
    """Returns the seed of local training of `client` in round `number`."""
    return derive(seed, "training", number, client)


def encoding(seed: int, tensor: str) -> int:
    """Returns the seed of a codec that draws, for a tensor of the update that the training seed `seed` belongs to."""
    return derive(seed, "encoding", tensor)


def initialisation(seed: int) -> int:
    """Returns the seed of adapter version 0 (head, LoRA factors, prompts...)."""
    return derive(seed, "initialisation")


def sampling_rank(seed: int, number: int, client: str) -> int:
    """Returns the key by which clients are ordered for sampling in round `number`: the smallest are taken."""
    return derive(seed, "sampling", number, client)
