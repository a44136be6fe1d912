"""A model under a PEFT method: its spec, its tensors out and in, its modes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from fedpeft import seeds
from fedpeft.adapters.payload import Tensors
from fedpeft.adapters.spec import AdapterSpec, TensorSpec
from fedpeft.config import ModelConfig
from fedpeft.errors import ConfigInvalid, ModelInvalid
from fedpeft.models.backbones import Backbone, skeleton
from fedpeft.models.checkpoints import inside
from fedpeft.models.structure import ModelStructure
from fedpeft.models.tied_weights import names_of, put
from fedpeft.peft.method import Method, make, unfit


class TunedModel:
    """A backbone with an adapter.

    The frozen parameters are the backbone's own, shared and not copied; the tuned ones belong to this model, so any
    number of them stand on one backbone. Only tuned parameters require a gradient.

    Attributes:
        backbone: The backbone.
        method: The PEFT method.
        module: Takes and returns what the backbone's does.
        spec: The tuned tensors.
        names: Their names in `module`, by those of the spec.
        checkpointing: True if blocks forget their activations and compute them again in the backward pass.
    """

    def __init__(
        self,
        backbone: Backbone,
        method: Method[Any],
        module: nn.Module,
        injected: Sequence[nn.Module],
        spec: AdapterSpec,
    ) -> None:
        self.backbone = backbone
        self.method = method
        self.module = module
        self.spec = spec
        self.checkpointing = False
        self._injected = injected
        found = {method.canonical(name): (name, p) for name, p in module.named_parameters()}
        self.names = {tensor.name: found[tensor.name][0] for tensor in spec.tensors}
        self._tuned = {tensor.name: found[tensor.name][1] for tensor in spec.tensors}

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]:
        """The tuned tensors themselves, in the spec's order."""
        return self._tuned

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Returns copies of all tuned tensors, local ones included, float32, in the spec's order."""
        return arrays_of(self._tuned)

    def load(self, tensors: Tensors) -> None:
        """Sets tuned tensors. Those that are local in some round may be absent and stay as they are.

        Raises:
            ModelInvalid: If a tensor is missing, unknown or of another shape; nothing was set then.
        """
        if unknown := sorted(tensors.keys() - self._tuned.keys()):
            raise ModelInvalid(f"tensor {unknown[0]} is not of adapter {self.spec.method}")
        for tensor in self.spec.shared:
            if tensor.name not in tensors:
                raise ModelInvalid(f"tensor {tensor.name} of adapter {self.spec.method} is missing")
        for tensor in self.spec.tensors:
            given = tensors.get(tensor.name)
            if given is not None and given.shape != tensor.shape:
                raise ModelInvalid(f"tensor {tensor.name} has shape {given.shape}; the model needs {tensor.shape}")
        with torch.no_grad():
            for name, values in tensors.items():
                # A copy, because torch refuses arrays that are read-only, as those over received bytes are.
                self._tuned[name].copy_(torch.from_numpy(np.array(values, np.float32)))

    def trainable(self, number: int) -> dict[str, nn.Parameter]:
        """Chooses what trains in round `number` (1, 2, ...): everything tuned that is sent or local in it.

        Returns:
            Those parameters by name, in the spec's order. They require a gradient, all others do not; no gradient is
            left over.
        """
        chosen = {}
        for tensor in self.spec.tensors:
            parameter = self._tuned[tensor.name]
            trains = tensor.role(number).trains
            parameter.requires_grad_(trains)
            parameter.grad = None
            if trains:
                chosen[tensor.name] = parameter
        return chosen

    def copies(self, number: int) -> dict[str, nn.Parameter]:
        """Returns copies of all tuned tensors; those that train in round `number` require a gradient."""
        chosen = self.trainable(number)
        return {name: nn.Parameter(p.detach().clone(), requires_grad=name in chosen) for name, p in self._tuned.items()}

    def train(self) -> None:
        """Goes into training mode: the whole model, or only what was injected, as the method wants."""
        self.module.train(self.method.whole_model_trains)
        for module in self._injected:
            module.train()

    def checkpoint(self) -> bool:
        """Turns gradient checkpointing on (arXiv 1604.06174): less memory in training, more time, the same bits.

        Returns:
            True if that changed something: not if it was on, or the model has no `set_grad_checkpointing` as timm's do.
        """
        turn_on = getattr(self.module, "set_grad_checkpointing", None)
        if self.checkpointing or turn_on is None:
            return False
        turn_on(True)
        self.checkpointing = True
        return True

    def eval(self) -> None:
        """Goes into evaluation mode."""
        self.module.eval()


def arrays_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, NDArray[np.float32]]:
    """Returns copies of tensors as arrays, float32."""
    return {name: tensor.detach().to("cpu", torch.float32, copy=True).numpy() for name, tensor in tensors.items()}


def tune(backbone: Backbone, method: str, options: Mapping[str, object], seed: int) -> TunedModel:
    """Puts a backbone under a PEFT method; the backbone itself stays as it is.

    Args:
        backbone: Its frozen parameters are shared.
        method: Its registered name.
        options: The method's options.
        seed: The run's seed; initial values derive from it, on the CPU.

    Returns:
        The tuned model in eval mode, on the backbone's device, trainable as in round 1.

    Raises:
        ConfigInvalid: If there is no such method, or an option is wrong or fits nothing in this model.
    """
    chosen = make(method, options)
    shared = {id(p): p for p in backbone.module.parameters()}
    module, structure = copy.deepcopy((backbone.module, backbone.structure), dict(shared))
    injected = _inject(method, chosen, module, structure, seed)
    module.to(backbone.device)
    spec = _spec(method, chosen, module, structure)
    tuned = {tensor.name for tensor in spec.tensors}
    names = names_of(module)
    for own, parameter in list(module.named_parameters()):
        if id(parameter) in shared and chosen.canonical(own) in tuned:
            put(module, names[own], nn.Parameter(parameter.detach().clone()))
        elif id(parameter) not in shared and chosen.canonical(own) not in tuned:
            parameter.requires_grad_(False)
    model = TunedModel(backbone, chosen, module, injected, spec)
    model.trainable(1)
    model.eval()
    return model


def spec_of(config: ModelConfig, method: str, options: Mapping[str, object]) -> AdapterSpec:
    """Returns the adapter spec of a run without its weights (meta device).

    Raises:
        ModelInvalid: If there is no such model, or not in this size or depth.
        ConfigInvalid: If there is no such method, or an option is wrong or fits nothing in this model.
    """
    chosen = make(method, options)
    module, structure = skeleton(config)
    _inject(method, chosen, module, structure, 0)
    return _spec(method, chosen, module, structure)


def timm_spec(model_name: str, method: str, options: Mapping[str, object], classes: int) -> AdapterSpec:
    """Returns the adapter spec of a method on a timm model with `classes` classes; needs no weights.

    Raises:
        ModelInvalid: As `spec_of`.
        ConfigInvalid: As `spec_of`, or if that is no name of a model or no possible number of classes.
    """
    try:
        config = ModelConfig(name=model_name, weights="none", classes=tuple(map(str, range(classes))))
    except ValidationError as error:
        raise ConfigInvalid(
            f"model {model_name!r} with {classes} classes: {error.errors(include_url=False)[0]['msg']}"
        ) from None
    return spec_of(config, method, options)


def count(model_name: str, method: str, options: Mapping[str, object], classes: int) -> int:
    """Returns how many values a method tunes in a timm model, the head included; raises as `timm_spec`."""
    return timm_spec(model_name, method, options, classes).parameters


def _inject(
    name: str, chosen: Method[Any], module: nn.Module, structure: ModelStructure, seed: int
) -> Sequence[nn.Module]:
    for part in chosen.needs:
        if not getattr(structure, part):
            raise unfit(f"{name} attaches to a model's {part}, and this model names none")
    return chosen.inject(module, structure, torch.Generator().manual_seed(seeds.initialisation(seed)))


def _spec(name: str, chosen: Method[Any], module: nn.Module, structure: ModelStructure) -> AdapterSpec:
    """Returns the tuned tensors: a tied parameter is one, and is tuned if it is under any of its names."""

    def tuned(names: Iterable[str]) -> bool:
        return any(inside(n, structure.head) or chosen.tunes(n) for n in map(chosen.canonical, names))

    names, parameters = names_of(module), dict(module.named_parameters())
    found = [(chosen.canonical(first), tuple(parameters[first].shape)) for first in names if tuned(names[first])]
    return AdapterSpec.of(name, [TensorSpec(n, shape, chosen.roles(n)) for n, shape in found])
