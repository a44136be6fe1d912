"""FedSA-LoRA (Guo et al., arXiv 2410.01463): A is averaged, B and the head stay at each client: personal models.

A learns what clients have in common and B what is their own, so only A travels: in / (in + out) of LoRA's bytes, both
ways. A new client begins with B = 0 and a fresh head. A version has neither, so its accuracy on held-out data is that
of a fresh head and says nothing; each client's own figures, its training loss, do.
"""

from __future__ import annotations

from fedpeft.adapters.spec import TensorRole
from fedpeft.peft.method import methods
from fedpeft.peft.tuners.lora import A, B, Lora, LoraOptions, is_factor


class FedSaLoraOptions(LoraOptions):
    """Options of FedSA-LoRA."""

    local_head: bool = True
    """Keeps the head at the client too, as the paper does; else it is sent and averaged."""


@methods.register("fedsa_lora")
class FedSaLora(Lora):
    """LoRA whose A is sent, and whose B and head each client keeps."""

    Options = FedSaLoraOptions
    options: FedSaLoraOptions

    def roles(self, name: str) -> tuple[TensorRole, ...]:
        """See `Method.roles`."""
        kept = is_factor(name, B) or (self.options.local_head and not is_factor(name, A))
        return (TensorRole.LOCAL,) if kept else (TensorRole.SENT,)
