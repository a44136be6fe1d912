"""Gradients of several clients' batches in one pass over the model that they share.

Each client has its own tuned tensors. They are stacked along a first axis, and the loss is mapped over it
(`torch.func.vmap`): layers whose parameters are frozen see the examples of all clients as one batch, and tuned ones
compute with a tensor a client. Notable:
- It takes any method and any task of plain torch code: nothing is written for each.
- Stacking is part of the graph, so each client's parameters get their own gradients. Its optimizer, its clipping and
  its local algorithm are those of a training alone. A client that takes no part in a pass is not touched by it.
- Batches are padded to the largest by their last example, whose repetitions are in no loss. Batches of less than half
  its size make a pass of their own, as do those whose tensors have other shapes.
- A pass of one client computes what a training alone does, to its bits. One of several has matrices of other shapes,
  whose products round otherwise.
- Each client's random numbers come from a stream of its own, as if it were alone; those of dropout too, on the CPU.
- A pass that does not fit into memory is made with half as many clients.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch import nn
from torch.func import functional_call, vmap

from fedpeft.errors import ConfigInvalid
from fedpeft.models.tasks import Batch, Task
from fedpeft.peft import TunedModel
from fedpeft.training.batches import size
from fedpeft.training.gradients import Gradients, TaskLoss, mean_loss
from fedpeft.training.loop import Training
from fedpeft.training.precision import autocast
from fedpeft.training.randomness import Generators, Stream

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Turn:
    """A client's next batch.

    Attributes:
        training: The client's.
        stream: Its random numbers.
        batch: On the device.
    """

    training: Training
    stream: Stream
    batch: Batch


class StackedGradients:
    """Computes gradients of several clients' mean losses.

    Args:
        task: The model's.
        model: The model; its own tuned tensors are neither read nor changed.
        device: Device of the computation.
    """

    def __init__(self, task: Task, model: TunedModel, device: torch.device) -> None:
        self._task = task
        self._model = model
        self._device = device
        self._loss = TaskLoss(task, model.module)
        self._most = 0

    def compute(self, turns: Sequence[Turn]) -> list[torch.Tensor]:
        """Leaves the gradients of each client's mean loss at its parameters; returns those losses.

        Raises:
            ConfigInvalid: If model or task compute something that cannot be mapped over clients.
            TrainingFailed: If a single example does not fit into memory, or the task returns no loss an example.
        """
        found: dict[int, torch.Tensor] = {}
        waiting = sorted(range(len(turns)), key=lambda at: -size(turns[at].batch))  # stable: the same in every repeat
        while waiting:
            chosen = _alike(waiting, turns)[: self._most or None]
            losses = self._pass([turns[at] for at in chosen])
            if losses is None:
                self._most = -(-len(chosen) // 2)
                _log.warning("out_of_gpu_memory", clients=len(chosen), clients_in_a_pass=self._most)
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            found.update(zip(chosen, losses, strict=True))
            waiting = [at for at in waiting if at not in found]
        return [found[at] for at in range(len(turns))]

    def _pass(self, turns: Sequence[Turn]) -> list[torch.Tensor] | None:
        """Makes one pass; returns None, with no gradient left, if it does not fit into memory."""
        if len(turns) == 1:
            return [self._alone(turns[0])]
        for turn in turns:
            turn.stream.mark()
        try:
            return self._together(turns)
        except torch.OutOfMemoryError:
            for turn in turns:
                turn.training.optimizer_steps.clear()
                turn.stream.back()
        return None  # outside the handler: see `Gradients`

    def _alone(self, turn: Turn) -> torch.Tensor:
        training = turn.training
        values = {f"module.{self._model.names[name]}": tensor for name, tensor in training.tensors.items()}
        gradients = Gradients(self._task, self._model, training.dtype, self._device)
        with turn.stream.drawn():
            return gradients.compute(training, turn.batch, lambda inputs: self._called(values, inputs))

    def _together(self, turns: Sequence[Turn]) -> list[torch.Tensor]:
        inputs = []
        for turn in turns:
            with turn.stream.drawn():
                inputs.append(self._task.transform(turn.batch, turn.training.dataset))
        sizes = [size(each) for each in inputs]
        batch = _stacked(inputs, max(sizes))
        values = {
            f"module.{own}": torch.stack([turn.training.tensors[name] for turn in turns])
            for name, own in self._model.names.items()
        }
        with autocast(turns[0].training.dtype, self._device), _dropout(self._model.module, turns, sizes) as clients:
            losses = self._mapped(values, clients, batch)
        if losses.shape != (len(turns), max(sizes)):
            mean_loss(losses[0], max(sizes), self._task)  # which says what is wrong
        means = [mean_loss(losses[at, :count], count, self._task) for at, count in enumerate(sizes)]
        steps = [turn.training.optimizer_steps for turn in turns]
        torch.stack([each.scaled(mean) for each, mean in zip(steps, means, strict=True)]).sum().backward()  # type: ignore[no-untyped-call]
        return [mean.detach() for mean in means]

    def _mapped(self, values: Mapping[str, torch.Tensor], clients: _Clients, batch: Batch) -> torch.Tensor:
        def of_client(own: Mapping[str, torch.Tensor], position: torch.Tensor, inputs: Batch) -> torch.Tensor:
            clients.position = position
            return self._called(own, inputs)

        randomness, before = "same" if clients.drop else "error", Generators.of(self._device)
        every = torch.arange(len(clients.turns), device=self._device)
        try:
            with warnings.catch_warnings():  # attention on a CPU is computed client by client: no slower than alone
                warnings.filterwarnings("ignore", "There is a performance drop")
                losses: torch.Tensor = vmap(of_client, randomness=randomness)(values, every, dict(batch))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise _unfit(str(error).strip().partition("\n")[0]) from error
        if clients.drop and not Generators.of(self._device).same_as(before):
            raise _unfit("beside dropout it draws other random numbers")
        return losses

    def _called(self, values: Mapping[str, torch.Tensor], inputs: Batch) -> torch.Tensor:
        losses: torch.Tensor = functional_call(self._loss, dict(values), (inputs,))
        return losses


def _unfit(cause: str) -> ConfigInvalid:
    text = f'is "batched", which cannot compute this model or loss for several clients: {cause}'
    return ConfigInvalid(f"simulation.engine: {text}", (("simulation.engine", text),))


@dataclass(slots=True)
class _Clients:
    """The clients of a pass.

    Attributes:
        turns: Their turns.
        drop: True if the model drops values.
        position: The position of the one for which the loss is being mapped.
    """

    turns: Sequence[Turn]
    drop: bool = False
    position: torch.Tensor | None = None


@contextmanager
def _dropout(module: nn.Module, turns: Sequence[Turn], sizes: Sequence[int]) -> Iterator[_Clients]:
    """Draws the masks of dropout from each client's stream, for the examples that it really has."""
    clients = _Clients(turns)

    def after(part: nn.Dropout, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        assert clients.position is not None
        shape, kept = args[0].shape, 1 - part.p
        masks = torch.zeros((len(turns), *shape), dtype=output.dtype, device=output.device)
        for mask, turn, count in zip(masks, turns, sizes, strict=True):
            with turn.stream.drawn():
                mask[:count] = torch.empty(count, *shape[1:], dtype=mask.dtype, device=mask.device).bernoulli_(kept)
        return output * masks.div_(kept).index_select(0, clients.position.reshape(1)).squeeze(0)

    with ExitStack() as until_the_end:
        for part in module.modules():
            if isinstance(part, nn.Dropout) and part.training and part.p:
                clients.drop = True
                part.eval()
                until_the_end.callback(part.train)
                until_the_end.enter_context(_removed(part.register_forward_hook(after)))
        yield clients


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _alike(waiting: Sequence[int], turns: Sequence[Turn]) -> list[int]:
    """Returns those of the turns, in order of size, that go into a pass with the first."""
    first = turns[waiting[0]].batch
    return [
        at for at in waiting if 2 * size(turns[at].batch) >= size(first) and _shapes(turns[at].batch) == _shapes(first)
    ]


def _shapes(batch: Batch) -> Hashable:
    return tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in batch.items())


def _stacked(batches: Sequence[Batch], most: int) -> dict[str, torch.Tensor]:
    """Returns batches along a first axis, [clients, most, ...]; the last example of a smaller one is repeated."""
    return {name: torch.stack([_padded(batch[name], most) for batch in batches]) for name in batches[0]}


def _padded(tensor: torch.Tensor, most: int) -> torch.Tensor:
    missing = most - len(tensor)
    return tensor if not missing else torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])
