"""VeRA (Kopiczko et al., arXiv 2310.11454) through the `peft` library: W x + b * (B (d * (A x))), A and B fixed.

The vectors d and b are tuned, for each layer its own; A and B are random, shared by all layers, and never trained. They
do not travel: each site draws them from the option `seed` by integer arithmetic and one rounded product a value, so
that they have the same bits on every machine, as torch's generators and kernels do not promise. d starts at `d_initial`
and b at zero, so the model starts as the backbone. Layers of other sizes than the largest take the first rows and
columns of A and B.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn

from fedpeft import seeds
from fedpeft.adapters.payload import Tensors
from fedpeft.errors import ConfigInvalid
from fedpeft.models.structure import ModelStructure
from fedpeft.peft.method import MethodOptions, PeftForm, methods
from fedpeft.peft.tuners.tuner import ADAPTER, BESIDE, Targets, Tuner

if TYPE_CHECKING:
    from peft import VeraConfig

NAME = "vera"
PROJECTIONS = ("vera_A", "vera_B")
"""The library's names of A and B; its files have each once, beside the model."""
_KEYS = {"dropout": "vera_dropout", "d_initial": "d_initial"}


class VeraOptions(MethodOptions):
    """Options of VeRA."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 256
    """Rows of A and columns of B, which are fixed: a value of d for each."""
    targets: Targets = "qkv"
    """Linear layers of the blocks, as shell patterns for the end of a layer's name, such as qkv, attn.*, mlp.fc?."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a layer's input dropped on its way to A while training."""
    d_initial: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """First value of d."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of A and B."""


@methods.register(NAME)
class Vera(Tuner[VeraOptions]):
    """Tunes two vectors beside every target layer."""

    Options = VeraOptions
    parameters = frozenset({"vera_lambda_b", "vera_lambda_d"})
    peft_form = PeftForm("VERA", "a VeRA", "vectors that scale fixed random matrices", "vera", library="peft>=0.21")
    _shapes: Mapping[str, tuple[int, int]] = MappingProxyType({})

    @property
    def targets(self) -> Targets:
        """See `Tuner.targets`."""
        return self.options.targets

    def config(self, layers: Sequence[str]) -> VeraConfig:
        """See `Tuner.config`; the library saves A and B with the vectors, since it would draw others.

        Before 0.21 it saves them and, loading the folder, draws its own without a word.
        """
        from peft import VeraConfig

        options = self.options
        return VeraConfig(
            r=options.rank,
            target_modules=list(layers),
            projection_prng_key=options.seed,
            save_projection=True,
            vera_dropout=options.dropout,
            d_initial=options.d_initial,
            bias="none",
        )

    def wrap(self, module: nn.Module, layers: Sequence[str]) -> None:
        """See `Tuner.wrap`; A and B are in no state dict."""
        from peft import VeraModel

        config = self.config(layers)
        config.save_projection = False
        VeraModel(module, config, ADAPTER)

    def inject(self, module: nn.Module, structure: ModelStructure, generator: torch.Generator) -> Sequence[nn.Module]:
        """See `Tuner.inject`; all layers hold one A and one B."""
        layers = super().inject(module, structure, generator)
        held = {name: getattr(layers[0], name)[ADAPTER] for name in PROJECTIONS}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        for name, tensor in held.items():
            tensor.copy_(torch.from_numpy(self._projection(name)))
        return layers

    def start(self, layer: nn.Module, generator: torch.Generator) -> None:
        """See `Tuner.start`."""
        layer.get_parameter(f"vera_lambda_d.{ADAPTER}").fill_(self.options.d_initial)
        layer.get_parameter(f"vera_lambda_b.{ADAPTER}").zero_()

    @classmethod
    def from_peft_config(cls, config: Mapping[str, Any], targets: tuple[str, ...]) -> dict[str, object]:
        """See `Method.from_peft_config`."""
        if missing := sorted({"r", "projection_prng_key"} - config.keys()):
            raise ConfigInvalid(f"has no {missing[0]}, which every VeRA has")
        if config.get("bias", "none") != "none":
            raise ConfigInvalid(f"uses bias, which method {NAME} does not have")
        options = {name: config[key] for name, key in _KEYS.items() if key in config}
        return {**options, "rank": config["r"], "seed": config["projection_prng_key"], "targets": targets}

    def peft_state(self, state: Tensors) -> Tensors:
        """See `Method.peft_state`."""
        return {**state, **{f"{BESIDE}{name}": self._projection(name) for name in PROJECTIONS}}

    def from_peft_state(self, state: Tensors) -> Tensors:
        """See `Method.from_peft_state`."""
        found = dict(state)
        for name in PROJECTIONS:
            values = found.pop(f"{BESIDE}{name}", None)
            if values is None:
                raise ConfigInvalid(f"has no {name}: the library would draw it, and otherwise than method {NAME} does")
            if not np.array_equal(values, self._projection(name)):
                raise ConfigInvalid(f"has another {name} than method {NAME} draws from seed {self.options.seed}")
        return found

    def _projection(self, name: str) -> NDArray[np.float32]:
        return drawn(self.options.seed, name, self._shapes[name])


def drawn(seed: int, name: str, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Returns a fixed matrix, float32 [out, in], Kaiming-uniform: in (-b, b) with b = sqrt(6 / in).

    The raw output of PCG64 is the same in all releases of NumPy. Its upper 24 bits make an exact multiple of 2^-23 in
    [-1, 1), and IEEE 754 says how the product with b rounds.
    """
    raw = np.random.PCG64(seeds.derive(seed, NAME, name)).random_raw(shape[0] * shape[1]) >> np.uint64(40)
    values = (raw.astype(np.float32) - np.float32(2**23)) * np.float32(2**-23)
    return (values * np.float32(math.sqrt(6 / shape[1]))).reshape(shape)
