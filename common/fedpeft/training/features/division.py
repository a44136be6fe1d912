"""The place where a run's model is divided: before its first tuned tensor."""

from __future__ import annotations

from fedpeft.config import RunConfig
from fedpeft.errors import ConfigInvalid
from fedpeft.models.halves import Halves
from fedpeft.models.tasks import Task
from fedpeft.peft import TunedModel


def halves_of(config: RunConfig, task: Task, model: TunedModel) -> Halves | None:
    """Returns a run's model in two, before and from its first tuned tensor on; None if the run keeps no features.

    Raises:
        ConfigInvalid: If it would keep some, and there are none that stay as they are.
    """
    if not config.training.keep_features:
        return None
    structure, module, method = model.backbone.structure, model.module, config.peft.method
    tuned = {id(tensor): name for name, tensor in model.tensors.items()}
    named = module.named_parameters(remove_duplicate=False)  # a tied parameter is used wherever it has a name
    parts, first = min((structure.parts_before(name), tuned[id(p)]) for name, p in named if id(p) in tuned)
    if not parts:
        raise _unkept(f"method {method!r} tunes {first}, at the model's beginning: no features stay as they are")
    model.train()
    changing = [
        name for name, part in module.named_modules() if part.training and structure.parts_before(f"{name}.") < parts
    ]
    model.eval()
    if changing:
        raise _unkept(
            f"method {method!r} trains with {changing[0] or 'the whole model'} in training mode, where dropout, "
            "stochastic depth and batch norm change features"
        )
    halves = task.halves(module, config.model, parts)
    if halves is None:
        raise _unkept(f"{config.model.name} cannot be divided before {first}, the first tensor that is tuned")
    return halves


def _unkept(why: str) -> ConfigInvalid:
    text = f"is true, and {why}; leave it out, or tune the end of a model of timm, as methods head and partial do"
    return ConfigInvalid(f"training.keep_features: {text}", (("training.keep_features", text),))
