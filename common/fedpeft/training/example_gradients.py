"""Gradients of example-level differential privacy: DP-SGD (1607.00133) over the tuned tensors, whatever the method.

    gradient = (sum over the batch of g_i min(1, C / ||g_i||) + N(0, (z C)^2 I)) / expected size of a batch

g_i is the gradient of one example's loss, over all tensors that the round trains. Notable:
- `torch.func` computes the gradients of single examples in one pass, for any method and any task of plain torch code.
  Rules for kinds of layers, as opacus has them, would need one more for each kind of parameter beside a layer.
- The divisor is the same for every batch: its true size depends on who was drawn.
- An empty batch makes a step of noise alone, or its absence would say that nobody was drawn.
- A gradient that is not finite adds nothing: it has no norm to clip.
- The sum is made in float64 and is a multiple of a grid, as is the result: see `fedpeft.privacy.noise`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedpeft.errors import TrainingFailed
from fedpeft.models.tasks import Batch, Task
from fedpeft.peft import TunedModel
from fedpeft.privacy.noise import GriddedNoise
from fedpeft.training.batches import size, split
from fedpeft.training.gradients import TaskLoss, Trained, out_of_memory
from fedpeft.training.precision import autocast

Values = dict[str, torch.Tensor]
"""By the name of a parameter in the module."""

_ROUNDING = 2.0**-20
"""Part of the bound by which a gradient is clipped further, for its norm is rounded."""


@dataclass(frozen=True, slots=True)
class ExampleNoise:
    """Bound and noise that hide an example in a step.

    Attributes:
        bound: C, the most that one example may add to a step's sum, by its Euclidean norm.
        noise_multiplier: Standard deviation of the noise, in bounds: z.
    """

    bound: float
    noise_multiplier: float


class ExampleGradients:
    """Computes gradients that hide each example.

    Args:
        task: The model's.
        model: The model, which is trained in its own tensors.
        noise: Bound and noise.
        expected: Expected number of examples in a batch.
        dtype: In which the forward pass computes.
        device: Device of the computation.
    """

    def __init__(
        self,
        task: Task,
        model: TunedModel,
        noise: ExampleNoise,
        expected: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._task = task
        self._model = model
        self._noise = noise
        self._expected = expected
        self._dtype = dtype
        self._device = device
        self._loss = TaskLoss(task, model.module)
        own = dict(model.module.named_parameters(remove_duplicate=False))
        named = {name: own[name] for name in model.names.values()}
        self._parameters = {name: p for name, p in named.items() if p.requires_grad}

    def compute(self, training: Trained, batch: Batch) -> torch.Tensor:
        """Leaves the noised gradients of a batch at the parameters; returns its mean loss, 0 if it is empty.

        The loss is without noise: it is for whoever sits beside the data.
        """
        while (found := self._added_up(training, batch)) is None:
            if min(training.micro, size(batch)) == 1:
                raise TrainingFailed(
                    f"the gradients of one {self._task.example} do not fit into the memory of {self._device}; take a "
                    "smaller model or input"
                )
            held = min(training.micro, size(batch))
            training.micro = -(-held // 2)
            out_of_memory(self._device, training.micro, "sums add up to the batch's", images=held)
        sums, losses = found
        self._publish(sums)
        finite = losses[losses.isfinite()]
        return finite.mean() if len(finite) else torch.zeros((), device=self._device)

    def _added_up(self, training: Trained, batch: Batch) -> tuple[Values, torch.Tensor] | None:
        """Returns the sums of clipped gradients, float64, and the losses [n]; None if they do not fit into memory."""
        zeros = {n: torch.zeros(p.shape, dtype=torch.float64, device=p.device) for n, p in self._parameters.items()}
        losses = [torch.zeros(0, device=self._device)]
        try:
            for part in split(batch, training.micro) if batch else ():
                each, values = self.of_examples(self._task.transform(part, training.dataset))
                for name, total in clipped_sum(each, self._noise.bound).items():
                    zeros[name] += total
                losses.append(values)
            return zeros, torch.cat(losses)
        except torch.OutOfMemoryError:
            pass
        return None  # outside the handler: while it runs, the exception holds the tensors that filled the memory

    def of_examples(self, inputs: Batch) -> tuple[Values, torch.Tensor]:
        """Returns the gradients of single examples, [n, ...] each, and their losses [n].

        Args:
            inputs: A transformed batch.

        Raises:
            TrainingFailed: If model or task compute something that cannot be taken apart into examples.
        """

        def of_example(values: Mapping[str, torch.Tensor], example: Batch) -> torch.Tensor:
            batch = {name: tensor.unsqueeze(0) for name, tensor in example.items()}
            losses: torch.Tensor = functional_call(self._loss, dict(values), (batch,))
            if losses.shape != (1,):
                raise TrainingFailed(
                    f"{type(self._task).__name__}.loss returned {tuple(losses.shape)}; a loss for each of 1 is needed"
                )
            return losses[0].float()

        values = {f"module.{name}": p.detach() for name, p in self._parameters.items()}
        each = vmap(grad_and_value(of_example), in_dims=(None, 0), randomness="different")
        try:
            # Attention as plain products computes all examples at once; faster kernels would loop over them.
            with autocast(self._dtype, self._device), sdpa_kernel(SDPBackend.MATH):
                gradients, losses = each(values, dict(inputs))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            cause = str(error).strip().partition("\n")[0]
            raise TrainingFailed(
                f'privacy.mechanism is "example", which cannot take apart this model or loss: {cause}'
            ) from error
        return {name.removeprefix("module."): gradient for name, gradient in gradients.items()}, losses

    def _publish(self, sums: Values) -> None:
        """Adds noise to the sums, divides them, and leaves them as gradients."""
        values = sum(total.numel() for total in sums.values())
        noise = GriddedNoise.of(self._noise.bound, self._noise.noise_multiplier, values)
        for name, total in sums.items():
            noised = total.cpu()  # the sum itself, where it is on the CPU: nothing needs it any more
            noise.add(noised.numpy(), self._expected)
            parameter = self._parameters[name]
            parameter.grad = noised.to(parameter.device, parameter.dtype)


def clipped_sum(gradients: Mapping[str, torch.Tensor], bound: float) -> Values:
    """Returns the sum of examples' gradients, each scaled down to a norm over all tensors, in float64.

    Args:
        gradients: [n, ...] by name.
        bound: The norm.
    """
    squares = [each.flatten(1).double().square().sum(1) for each in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt()
    factors = (bound * (1 - _ROUNDING) / norms).clamp(max=1.0)  # of a norm of 0: infinity, clamped
    good = norms.isfinite()
    if not good.all():
        factors = factors[good]
        gradients = {name: each[good] for name, each in gradients.items()}
    return {name: (factors @ each.flatten(1).double()).reshape(each.shape[1:]) for name, each in gradients.items()}
