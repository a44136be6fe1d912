"""LayerNorm tuning (Zhao et al., arXiv 2312.11420): weight and bias of every layer norm.

RMS norms count, which have no bias. Nothing is added to the model, so its result is a plain model too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import Method, MethodOptions, methods, unfit
from fedpeft.peft.places import norms


@methods.register("layernorm")
class LayerNorm(Method[MethodOptions]):
    """Tunes the parameters of every layer norm, those outside of the blocks included."""

    _norms: frozenset[str] = frozenset()

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Method.inject`; adds nothing and finds the norms."""
        self._norms = frozenset(norms(module))
        if not self._norms:
            raise unfit("layernorm tunes a model's layer norms, and this model has none")
        return ()

    def tunes(self, name: str) -> bool:
        """See `Method.tunes`."""
        return name.rpartition(".")[0] in self._norms
