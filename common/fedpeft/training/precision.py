"""Floating-point types in which a device computes, and the casts and scales that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import structlog
import torch
from torch import nn

from fedpeft.errors import TrainingFailed

INITIAL_SCALE = 2.0**16
"""Factor of float16 losses at the beginning of a training; halved until gradients stay finite."""

_log = structlog.get_logger(__name__)


def precision(wanted: str, device: torch.device) -> torch.dtype:
    """Returns the type in which a device computes when a run wants a precision.

    auto is bfloat16 on a GPU that has it in hardware and float32 elsewhere. A device that lacks the wanted type
    computes in float32, which is more exact.
    """
    cuda = device.type == "cuda"
    bfloat16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "float16":
        return torch.float16 if cuda else torch.float32
    if wanted == "bfloat16":
        return torch.bfloat16 if bfloat16 or device.type == "cpu" else torch.float32
    return torch.bfloat16 if wanted == "auto" and bfloat16 else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Returns the context in which a forward pass computes in `dtype`."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)


@contextmanager
def multiplying(wanted: str, device: torch.device) -> Iterator[None]:
    """Lets float32 matrix products on a GPU use TF32 where a run wants `auto`, and never where it wants float32."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    fast = wanted == "auto"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cudnn.allow_tf32 = fast
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def lowered(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Holds the frozen weights of linear and convolution layers in `dtype`, once, as autocast casts them at every pass.

    The results have the same bits. Parameters that other layers use too stay as they are: those compute in float32.
    Float32 values are back at the end; meanwhile both are in memory.
    """
    if dtype is torch.float32:
        yield
        return
    layers = (nn.Linear, nn.Conv2d)
    others = {
        id(p) for part in module.modules() if not isinstance(part, layers) for p in part.parameters(recurse=False)
    }
    kept: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    try:
        for part in module.modules():
            for p in part.parameters(recurse=False) if isinstance(part, layers) else ():
                if not p.requires_grad and id(p) not in others and id(p) not in kept:
                    kept[id(p)] = p, p.data
                    p.data = p.data.to(dtype)
        yield
    finally:
        for parameter, values in kept.values():
            parameter.data = values


class Steps:
    """Optimizer steps; in float16 with scaled losses, so that small gradients do not vanish.

    Args:
        optimizer: Of the tuned parameters.
        dtype: In which the forward pass computes.
        device: Device of the computation.
        after_gradient: Called before each step, with the gradients unscaled and clipped.
        largest_norm: Largest Euclidean norm of a step's gradient, over all parameters of the optimizer; None for any.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        dtype: torch.dtype,
        device: torch.device,
        after_gradient: Callable[[], None],
        largest_norm: float | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._largest_norm = largest_norm
        self._after_gradient = after_gradient
        self._scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, enabled=dtype is torch.float16)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a loss's gradients to those that are there."""
        self.scaled(loss).backward()  # type: ignore[no-untyped-call]

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Returns the loss whose gradients `take` expects: float16's is larger."""
        return self._scaler.scale(loss)

    def take(self) -> bool:
        """Makes a step and clears the gradients; returns False where they overflowed and the batch is to be repeated.

        Raises:
            TrainingFailed: If they overflow float16 however small the scale is.
        """
        self._scaler.unscale_(self._optimizer)
        if self._largest_norm is not None:
            # Before the hook: what is bounded is the part of the data. FedProx pulls as hard as it says, and SCAFFOLD's
            # control variates stay means of the gradients that were stepped by.
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._largest_norm)
        self._after_gradient()
        self._scaler.step(self._optimizer)
        before = self._scaler.get_scale() if self._scaler.is_enabled() else 1.0
        self._scaler.update()
        self.clear()
        if not self._scaler.is_enabled() or self._scaler.get_scale() >= before:
            return True
        if before < 1:
            raise TrainingFailed("gradients overflow float16 unscaled; take precision bfloat16 or float32")
        _log.info("float16_overflow", scale=self._scaler.get_scale(), effect="the step is repeated with this scale")
        return False

    def clear(self) -> None:
        """Drops all gradients."""
        self._optimizer.zero_grad(set_to_none=True)
