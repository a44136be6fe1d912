"""RoLoRA (Chen et al., arXiv 2502.01755): LoRA whose factors take turns, B in rounds 1, 3, 5..., A in rounds 2, 4, 6...

The factor that is not trained has the same bits at all clients, so the mean of the other is the mean of the products.
B begins, because the gradient of A is zero while B is. The head is trained in every round.
"""

from __future__ import annotations

from fedpeft.adapters.spec import TensorRole
from fedpeft.peft.method import methods
from fedpeft.peft.tuners.lora import A, B, Lora, is_factor


@methods.register("rolora")
class RoLora(Lora):
    """LoRA whose rounds train B and A in turn."""

    def roles(self, name: str) -> tuple[TensorRole, ...]:
        """See `Method.roles`."""
        if is_factor(name, B):
            return TensorRole.SENT, TensorRole.FROZEN
        return (TensorRole.FROZEN, TensorRole.SENT) if is_factor(name, A) else (TensorRole.SENT,)
