"""FFA-LoRA (Sun et al., arXiv 2403.12313): LoRA with A frozen as it was drawn; B and the head are trained and sent.

With one A for all clients the mean of the B is exact: W + s mean(B_i) A = mean(W + s B_i A). A is a part of version 0,
so all clients have the same bits of it; after its first version a client gets B and the head only.
"""

from __future__ import annotations

from fedpeft.adapters.spec import TensorRole
from fedpeft.peft.method import methods
from fedpeft.peft.tuners.lora import A, Lora, is_factor


@methods.register("ffa_lora")
class FfaLora(Lora):
    """LoRA whose A stays as it was drawn."""

    def roles(self, name: str) -> tuple[TensorRole, ...]:
        """See `Method.roles`."""
        return (TensorRole.FROZEN,) if is_factor(name, A) else (TensorRole.SENT,)
