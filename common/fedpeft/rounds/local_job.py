"""A client's round as values, frozen and picklable: `LocalJob` in, `LocalUpdate` out.

`fedpeft.training.local_round.LoadedRun.train` turns one into the other, in a client's worker and in a simulation alike.
Named groups of tensors are a client's state: what it keeps from round to round, whatever it means. A new group needs no
code where jobs are made and updates are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedpeft.adapters.payload import Manifest, Tensors, check_payload, decode
from fedpeft.adapters.updates import Arrays, PreparedUpdate
from fedpeft.config import TrainingConfig
from fedpeft.errors import BudgetExhausted, TrainingFailed

Groups = Mapping[str, Tensors]
"""Tensors by group and name, float32."""


@dataclass(frozen=True, slots=True)
class Version:
    """An adapter version as a client receives it.

    Attributes:
        manifest: The description of the payload.
        payload: The file that holds it, so that the jobs of a round share one copy.
    """

    manifest: Manifest
    payload: Path

    def tensors(self) -> Arrays:
        """Reads the version's tensors, float32, those of all sections.

        Raises:
            OSError: If the file cannot be read.
            PayloadInvalid: If it does not hold what the manifest says.
        """
        data = memoryview(self.payload.read_bytes())
        check_payload(self.manifest, data)
        return decode(self.manifest, data)


@dataclass(frozen=True, slots=True)
class LocalJob:
    """One client's work in one round.

    Attributes:
        client: The client's id.
        round: The round (1, 2, ...): it chooses each tensor's role.
        seed: Seed of the training, see `fedpeft.seeds.training`.
        settings: `[training]` of this round.
        version: The adapter version to train from.
        state: The client's kept state, by group; an absent group is empty.
        rank: Largest rank of LoRA factors that the client's device bears; None: any. It counts where the strategy takes
            updates of a lower rank.
    """

    client: str
    round: int
    seed: int
    settings: TrainingConfig
    version: Version
    state: Groups = field(default_factory=dict)
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class LocalUpdate:
    """Result of a `LocalJob`.

    Attributes:
        client: The client's id.
        prepared: The encoded update.
        if_counted: The client's state if the server counts the update: each group replaces the one before, an empty one
            removes it, and a group that is absent stays as it is.
        if_not: The same if the server does not count it. A group that does not depend on it is the same object.
        examples: Examples that were trained on: the weight of the update.
        metrics: Figures of the training, see `fedpeft.training.loop.TrainingResult`; on a GPU also gpu_memory_bytes.
        facts: Facts that the bits depend on beside the job: torch's version, device, precision, threads.
    """

    client: str
    prepared: PreparedUpdate
    if_counted: Groups
    if_not: Groups
    examples: int
    metrics: dict[str, float]
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class LocalFailure:
    """Result of a `LocalJob` whose training ended without an update.

    Attributes:
        client: The client's id.
        error: The reason: its class and its message.
    """

    client: str
    error: TrainingFailed | BudgetExhausted


LocalOutcome = LocalUpdate | LocalFailure
